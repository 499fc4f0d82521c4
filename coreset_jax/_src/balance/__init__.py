"""Balancing: walks that pick signs, the fields they start from, and repeated halving."""
