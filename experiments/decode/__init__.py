"""Decoding with the language model over compressed caches."""
