"""Compressors, the heads they work on, and the driver that runs them over a whole cache."""
