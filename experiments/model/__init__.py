"""The small language model whose caches the experiments compress."""
