"""What sample queries say of a cache."""
