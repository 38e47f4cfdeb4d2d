"""The thread that owns a model: runs, clicks and Stop, with the kernel free meanwhile."""
