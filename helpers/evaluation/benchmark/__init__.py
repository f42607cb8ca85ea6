"""Speed of kernels and decode steps."""
