"""The views: anywidgets that work alone, and the app that links them."""
