"""Caches in standard units, the kernels that tell pairs apart, and regularized solves."""
