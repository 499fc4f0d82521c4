"""Bounded summaries of streams, with the error fed back."""
