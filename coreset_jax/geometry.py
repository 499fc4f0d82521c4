"""Caches in the units of the theorems: unit keys, unit values and one radius for queries."""

from coreset_jax._src.geometry.standardize import (
    Calibration,
    Standardization,
    calibrate,
    standardize,
)

__all__ = ["Calibration", "Standardization", "calibrate", "standardize"]
