"""Changes to make to a run, as plain data."""
