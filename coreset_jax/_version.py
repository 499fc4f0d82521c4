"""The version, read by the build and by ``coreset_jax.__version__``."""

__version__ = "0.1.0"
