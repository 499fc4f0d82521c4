"""Compressing the caches of the language model, and certifying the errors of its heads."""
