"""Fits: keys that are chosen and moved, and weights and values fitted behind them."""
