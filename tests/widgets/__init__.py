"""The widgets, in Python and in a browser."""
