"""The ``workbench`` command: record a run, and see what a saved one holds."""
