"""The implementation, in rooms; what is public stands above it, in ``coreset_jax`` itself."""
