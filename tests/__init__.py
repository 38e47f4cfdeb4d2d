"""Tests of the workbench; a package, so that `python -m tests.benchmarks` is ours whatever is installed."""
