"""Models whose components are spread over the ranks of a process group."""
