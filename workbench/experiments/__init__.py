"""Experiments as data: what was run, run again, and written out as a script."""
