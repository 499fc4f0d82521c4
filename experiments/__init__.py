"""Experiments: programs that measure the library. They need more than its own dependencies."""
