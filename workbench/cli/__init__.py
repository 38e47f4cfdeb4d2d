"""The ``workbench`` command: runs, experiments and sweeps, and what saved ones hold."""
