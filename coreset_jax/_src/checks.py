"""Argument checks shared by every public entry point; they run before any tracing."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

# No model has more key-value heads.
MOST_HEADS = 256


def is_traced(value: object) -> bool:
    """Whether ``value`` is abstract, so that only its shape and dtype may be looked at."""
    return isinstance(value, jax.core.Tracer)


def is_known(value: object) -> bool:
    """Whether the entries of ``value`` can be looked at: neither traced nor in other processes."""
    if is_traced(value):
        return False
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def is_number(value: object) -> bool:
    """Whether ``value`` is a number or an array of numbers that can be looked at."""
    return not is_traced(value) and isinstance(
        value, int | float | np.generic | np.ndarray | jax.Array
    )


def check_floating(name: str, array: Any) -> None:
    """Raises ``ValueError`` unless ``array`` is an array of a real floating dtype."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ValueError(f"{name} must be an array, got {type(array).__name__}.")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must have a floating dtype, got {array.dtype} {array.shape}.")


def check_unsharded(name: str, array: Any, axis: int) -> None:
    """Raises ``ValueError`` if each device is known to have a part of the sequence only.

    That is known of an array that can be looked at, and of types under Explicit axes. ``axis`` is
    that of the sequence.
    """
    if not isinstance(array, jax.Array):
        return
    count = array.shape[axis]
    if is_traced(array):
        sharding = jax.typeof(array).sharding
        names = sharding.spec[axis] or ()
        names = (names,) if isinstance(names, str) else names
        part = count // math.prod(sharding.mesh.shape[name] for name in names)
    else:
        part = array.sharding.shard_shape(array.shape)[axis]
    if part != count:
        raise ValueError(
            f"{name} must not be sharded along the sequence, axis {axis % array.ndim} of "
            f"{array.shape}: each device has {part} of {count} places. Shard batch or heads, which "
            "do not know of each other."
        )


def check_cache(keys: Any, values: Any) -> None:
    """Raises ``ValueError`` unless keys ``[..., n, d]`` and values ``[..., n, dv]`` pair up."""
    check_floating("keys", keys)
    check_floating("values", values)
    shapes = f"keys {keys.shape} and values {values.shape}"
    if keys.ndim < 2:
        raise ValueError(f"keys must have rank at least 2, [..., n, d]; got {shapes}.")
    if values.ndim != keys.ndim:
        raise ValueError(f"values must have the rank of keys; got {shapes}.")
    if values.shape[:-2] != keys.shape[:-2]:
        raise ValueError(f"values must have the leading axes of keys; got {shapes}.")
    if values.shape[-2] != keys.shape[-2]:
        raise ValueError(f"values must hold as many pairs (axis -2) as keys; got {shapes}.")
    if keys.shape[-2] < 1 or keys.shape[-1] < 1 or values.shape[-1] < 1:
        raise ValueError(f"keys and values must not be empty; got {shapes}.")
    check_unsharded("keys", keys, -2)
    check_unsharded("values", values, -2)


def check_queries(queries: Any, keys: Any) -> None:
    """Raises ``ValueError`` unless queries ``[..., q, d]`` fit keys ``[..., n, d]``."""
    check_floating("queries", queries)
    shapes = f"queries {queries.shape} and keys {keys.shape}"
    if queries.ndim != keys.ndim:
        raise ValueError(f"queries must have the rank of keys, [..., q, d]; got {shapes}.")
    if queries.shape[:-2] != keys.shape[:-2]:
        hint = _by_length(queries.shape, keys.shape)
        raise ValueError(f"queries must have the leading axes of keys; got {shapes}.{hint}")
    if queries.shape[-1] != keys.shape[-1]:
        raise ValueError(f"queries must have the width (axis -1) of keys; got {shapes}.")


def _by_length(queries: tuple[int, ...], keys: tuple[int, ...]) -> str:
    """What to transpose where shapes that do not fit seem to be ``[..., length, heads, d]``."""
    if len(keys) < 3 or queries[:-3] != keys[:-3]:
        return ""
    if queries[-2] == keys[-3]:
        names = "queries seem"
    elif queries[-2] == keys[-2] < keys[-3]:
        names = "queries, keys and values seem"
    else:
        return ""
    return f" The {names} to be [..., length, heads, d]: transpose them by swapaxes(-2, -3)."


def check_layout(keys: Any, size: int, lengths: Any) -> None:
    """Raises ``ValueError`` if keys are ``[..., length, heads, d]`` beyond doubt.

    That is where nothing would be left out of what ``size`` is to be left of, and where heads are
    more than any model has. Whoever gives a length for every head knows which ones heads are.
    """
    if keys.ndim < 4 or lengths is not None:
        return
    heads, count = keys.shape[-3:-1]
    if heads > max(MOST_HEADS, size) and count <= min(MOST_HEADS, size):
        raise ValueError(
            f"keys must be [..., heads, n, d], and seem to be [..., length, heads, d]: {count} "
            f"pairs in each of {heads} heads, of which size {size} leaves all; got {keys.shape}. "
            "Transpose keys and values by swapaxes(-2, -3)."
        )


def check_scores(scores: Any, keys: Any) -> None:
    """Raises ``ValueError`` unless scores ``[..., n]`` fit keys ``[..., n, d]``."""
    check_floating("scores", scores)
    if scores.shape != keys.shape[:-1]:
        raise ValueError(
            f"scores must be [..., n], one for each pair; got scores {scores.shape} and keys "
            f"{keys.shape}."
        )
    check_unsharded("scores", scores, -1)


def check_sink_logits(sink_logits: Any, queries: Any) -> None:
    """Raises ``ValueError`` unless there is one a head ``[...]`` or one a query ``[..., q]``."""
    if sink_logits is None:
        return
    check_floating("sink_logits", sink_logits)
    if sink_logits.shape not in (queries.shape[:-1], queries.shape[:-2]):
        raise ValueError(
            f"sink_logits must have shape {queries.shape[:-2]}, one a head, or "
            f"{queries.shape[:-1]}, one a query; got sink_logits {sink_logits.shape} and queries "
            f"{queries.shape}."
        )


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raises ``ValueError`` unless ``value`` is a static integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be a static Python int, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_size(size: object) -> None:
    """Raises ``ValueError`` unless ``size`` is a static integer of at least one."""
    check_count("size", size)


def check_finite(name: str, value: ArrayLike | None, leading: tuple[int, ...] = ()) -> None:
    """Raises ``ValueError`` unless ``value`` is real, finite, and one number or one a head.

    ``None`` passes; a value that cannot be looked at has only its shape checked.
    """
    if value is None:
        return
    shape = np.shape(value)
    if shape not in ((), leading):
        raise ValueError(f"{name} must be a scalar or have shape {leading}, got shape {shape}.")
    if not is_known(value):
        return
    array = np.asarray(value)
    if not (np.issubdtype(array.dtype, np.number) and np.isrealobj(array)):
        raise ValueError(f"{name} must be a real number, got {value!r}.")
    if not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be finite, got {value!r}.")


def check_positive(name: str, value: ArrayLike | None, leading: tuple[int, ...] = ()) -> None:
    """Raises ``ValueError`` unless ``value`` passes :func:`check_finite` and is above zero."""
    check_finite(name, value, leading)
    if value is not None and is_known(value) and not np.all(np.asarray(value) > 0):
        raise ValueError(f"{name} must be positive, got {value!r}.")


def static_float(name: str, value: Any, *, positive: bool = True) -> Any:
    """``value`` as a Python float, so that equal options hash alike; ``None`` passes.

    Raises ``ValueError`` unless it is one finite real number that is not traced, and above zero
    if ``positive``.
    """
    if value is None:
        return None
    if is_traced(value):
        raise ValueError(f"{name} is fixed at compile time and must not be traced.")
    check_finite(name, value)
    if positive:
        check_positive(name, value)
    return float(value)


def static_part(name: str, value: Any) -> float:
    """The part of a whole that is left to an option, as a Python float: at least 0 and below 1."""
    part = static_float(name, value, positive=False)
    if part is None or not 0 <= part < 1:
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}.")
    return float(part)


def check_lengths(lengths: Any, keys: Any) -> None:
    """Raises ``ValueError`` unless integer ``lengths`` have the leading axes of keys, in ``1..n``.

    ``None`` passes; the range of a traced array cannot be seen and is not checked.
    """
    if lengths is None:
        return
    shape = np.shape(lengths)
    leading, n = keys.shape[:-2], keys.shape[-2]
    if shape != leading:
        raise ValueError(
            f"lengths must have the leading axes of keys, {leading}; "
            f"got lengths {shape} and keys {keys.shape}."
        )
    dtype = lengths.dtype if hasattr(lengths, "dtype") else np.asarray(lengths).dtype
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"lengths must have an integer dtype, got {dtype}.")
    if not is_traced(lengths):
        array = np.asarray(lengths)
        if array.size and (array.min() < 1 or array.max() > n):
            raise ValueError(
                f"lengths must lie in 1..{n} (axis -2 of keys {keys.shape}); "
                f"got values from {array.min()} to {array.max()}."
            )


def check_indices(indices: Any, keys: Any) -> None:
    """Raises ``ValueError`` unless ``indices`` are integers ``[..., m]`` that fit the keys."""
    if not hasattr(indices, "shape") or not hasattr(indices, "dtype"):
        raise ValueError(f"indices must be an array, got {type(indices).__name__}.")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices must have an integer dtype, got {indices.dtype}.")
    if indices.shape[:-1] != keys.shape[:-2] or indices.ndim != keys.ndim - 1:
        raise ValueError(
            "indices must have shape [..., m] with the leading axes of keys; "
            f"got indices {indices.shape} and keys {keys.shape}."
        )
