"""The theorems, measured on synthetic caches."""
