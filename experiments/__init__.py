"""Experiments: binaries that need more than the library's own dependencies."""
