"""Argument checks of bounds on the worst query; they run before any tracing."""

from typing import Any

from jax.typing import ArrayLike
from jaxtyping import Array

from coreset_jax._src import checks
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, scale_of
from coreset_jax._src.geometry.standardize import check_radius


def check_comparison(
    keys: Array,
    values: Array,
    coreset: Coreset | SignedCoreset,
    query_center: Array | None,
    *,
    rho: ArrayLike | None,
    query_norm: ArrayLike | None,
    queries: Array | None,
    scale: ArrayLike | None,
    lengths: Any,
) -> ArrayLike | None:
    """The softmax scale of a coreset and its reader; ``None`` for the default.

    Raises ``ValueError`` unless the coreset fits its source, and one radius the queries.
    """
    checks.check_cache(keys, values)
    checks.check_lengths(lengths, keys)
    check_radius(keys, rho, query_norm, queries, scale)
    checks.check_cache(coreset.keys, coreset.values)
    if (
        coreset.keys.shape[:-2] != keys.shape[:-2]
        or coreset.keys.shape[-1] != keys.shape[-1]
        or coreset.values.shape[-1] != values.shape[-1]
        or coreset.log_weights.shape != coreset.keys.shape[:-1]
    ):
        raise ValueError(
            "coreset must have the leading axes and the widths of its source; "
            f"got coreset keys {coreset.keys.shape}, values {coreset.values.shape} and "
            f"log_weights {coreset.log_weights.shape} for keys {keys.shape} and "
            f"values {values.shape}."
        )
    scale = scale_of(coreset, scale)
    if query_center is None:
        return scale
    checks.check_floating("query_center", query_center)
    leading = keys.shape[:-2]
    shape = query_center.shape[:-1]
    if (
        query_center.shape[-1:] != keys.shape[-1:]
        or len(shape) > len(leading)
        or any(
            one not in (1, whole)
            for one, whole in zip(reversed(shape), reversed(leading), strict=False)
        )
    ):
        raise ValueError(
            "query_center must be [..., d] for keys [..., n, d]; got query_center "
            f"{query_center.shape} for keys {keys.shape}."
        )
    return scale


def positive_number(name: str, value: object) -> float:
    """``value`` as a Python float; raises ``ValueError`` unless it is static and above zero."""
    number = checks.static_float(name, value)
    if number is None:
        raise ValueError(f"{name} must be a number, got None.")
    return float(number)
