"""Configurations of the experiments, one module each."""
