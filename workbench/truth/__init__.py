"""Scores methods on the shapes world, where what is true is known."""
