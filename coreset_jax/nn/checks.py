"""Argument checks of caches and layers; they run before any tracing."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from coreset_jax._src import checks
from coreset_jax._src.attention import default_scale
from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.scale import differ, reading_scale
from coreset_jax.nn.kv_block import KVBlock


def check_pairs(keys: Any, values: Any) -> None:
    """Raises ``ValueError`` unless keys and values are ``[batch, length, kv_heads, width]``."""
    for name, array in (("keys", keys), ("values", values)):
        checks.check_floating(name, array)
        if array.ndim != 4 or 0 in array.shape[1:]:
            raise ValueError(
                f"{name} must be [batch, length, kv_heads, width], none of them 0; "
                f"got {array.shape}."
            )
        checks.check_unsharded(name, array, 1)
    if values.shape[:3] != keys.shape[:3]:
        raise ValueError(
            "values must have the batch, length and heads of keys; "
            f"got keys {keys.shape} and values {values.shape}."
        )


def _by_head(name: str) -> str:
    return (
        f" {name.capitalize()} seem to be [batch, heads, length, width]: transpose them by "
        "swapaxes(1, 2)."
    )


def check_example(keys: Any) -> None:
    """Raises ``ValueError`` if keys that show what is to come have their heads before places."""
    if keys.shape[2] > checks.MOST_HEADS >= keys.shape[1]:
        raise ValueError(
            f"keys must be [batch, length, kv_heads, head_dim]; got {keys.shape}, which are "
            f"{keys.shape[2]} kv heads.{_by_head('keys')}"
        )


def check_lengths(lengths: Any, keys: Any) -> None:
    """Raises ``ValueError`` unless integer ``lengths`` ``[batch]`` lie in ``0..length``.

    ``None`` passes; the range of a traced array cannot be seen and is not checked.
    """
    if lengths is None:
        return
    batch, count = keys.shape[:2]
    dtype = lengths.dtype if hasattr(lengths, "dtype") else np.asarray(lengths).dtype
    if np.shape(lengths) != (batch,) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of shape [batch] ({batch},), "
            f"got {dtype} {np.shape(lengths)}."
        )
    if not checks.is_traced(lengths):
        array = np.asarray(lengths)
        if array.size and (array.min() < 0 or array.max() > count):
            raise ValueError(
                f"lengths must lie in 0..{count} (axis 1 of keys {keys.shape}); "
                f"got values from {array.min()} to {array.max()}."
            )


def check_rows(rows: Any, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless ``rows`` are booleans ``[batch]``."""
    array = rows if hasattr(rows, "dtype") else np.asarray(rows)
    if array.dtype != bool or array.shape != shape:
        raise ValueError(
            f"rows must be booleans of shape [batch] {shape}, got {array.dtype} {array.shape}."
        )


def check_order(order: Any, batch: int) -> None:
    """Raises ``ValueError`` unless ``order`` names rows of a batch."""
    array = order if hasattr(order, "dtype") else np.asarray(order)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.ndim != 1:
        raise ValueError(
            f"order must be integers of shape [beams], got {array.dtype} {array.shape}."
        )
    if checks.is_known(array) and array.size:
        found = np.asarray(array)
        if found.min() < 0 or found.max() >= batch:
            raise ValueError(
                f"order must lie in 0..{batch - 1}, the rows of the cache; got values from "
                f"{found.min()} to {found.max()}."
            )


def check_back(lengths: Any, held: Any, shortest: Any) -> None:
    """Raises ``ValueError`` unless sequences of length ``held`` can be cut to ``lengths``."""
    array = lengths if hasattr(lengths, "dtype") else np.asarray(lengths)
    if not jnp.issubdtype(array.dtype, jnp.integer) or array.shape != held.shape:
        raise ValueError(
            f"lengths must be integers of shape [batch] {held.shape}, got {array.dtype} "
            f"{array.shape}."
        )
    if not (checks.is_known(array) and checks.is_known(shortest)):
        return
    wanted, least = np.asarray(array), np.asarray(shortest)
    if np.any(wanted < 0) or np.any(wanted < least):
        raise ValueError(
            f"lengths must be at least {least.tolist()}, since older pairs are not held exactly; "
            f"got {wanted.tolist()}. Keep the cache of then to go back further."
        )


def check_prefix(prefix: Any, held: KVBlock, scale: float) -> None:
    """Raises ``ValueError`` unless documents fit a cache that holds such pairs behind them."""
    reading_scale(prefix.pairs.scale, scale, prefix.pairs.offsets.shape[:-1] + held.keys.shape[1:2])
    batch, heads, _, width = held.keys.shape
    pairs = prefix.pairs
    documents = pairs.keys.shape[0] if pairs.keys.ndim == 3 else -1
    found = (pairs.num_heads, pairs.keys.shape[-1], pairs.values.shape[-1])
    if documents not in (1, batch) or found != (heads, width, held.values.shape[-1]):
        raise ValueError(
            f"prefix must hold 1 or {batch} documents of {heads} kv heads, for keys of width "
            f"{width} and values of width {held.values.shape[-1]}; got keys {pairs.keys.shape}, "
            f"values {pairs.values.shape} and {pairs.num_heads} heads."
        )


def check_new_pairs(keys: Any, values: Any, lengths: Any, held: KVBlock) -> None:
    """Raises ``ValueError`` unless pairs and ``lengths`` fit a cache that holds such pairs."""
    check_pairs(keys, values)
    for name, array, like in (("keys", keys, held.keys), ("values", values, held.values)):
        batch, heads, _, width = like.shape
        if (array.shape[0], *array.shape[2:]) != (batch, heads, width):
            swapped = (array.shape[0], array.shape[1], array.shape[3]) == (batch, heads, width)
            raise ValueError(
                f"{name} must be [batch, length, kv_heads, head_dim] of a cache for batch "
                f"{batch}, {heads} kv heads and width {width}; got {array.shape}."
                f"{_by_head(name) if swapped else ''}"
            )
        if array.dtype != like.dtype:
            raise ValueError(f"{name} must have the cache's dtype {like.dtype}, got {array.dtype}.")
    check_lengths(lengths, keys)


def check_queries(queries: Any, held: KVBlock) -> None:
    """Raises ``ValueError`` unless queries can read a cache that holds such pairs."""
    checks.check_floating("queries", queries)
    batch, kv_heads, _, width = held.keys.shape
    if queries.ndim != 4 or queries.shape[0] != batch or queries.shape[-1] != width:
        raise ValueError(
            f"queries must be [batch, length, heads, head_dim] with batch {batch} and "
            f"head_dim {width}, got {queries.shape}."
        )
    if queries.shape[2] == 0 or queries.shape[2] % kv_heads:
        swapped = queries.shape[1] and queries.shape[1] % kv_heads == 0
        raise ValueError(
            f"queries must have a multiple of the cache's {kv_heads} kv heads, got {queries.shape}."
            f"{_by_head('queries') if swapped else ''}"
        )


def check_one_each(queries: Any, keys: Any) -> None:
    """Raises ``ValueError`` unless there are as many keys as queries."""
    if keys.shape[1] != queries.shape[1]:
        swapped = keys.shape[1] == queries.shape[2]
        raise ValueError(
            f"keys must come one with each query; got queries {queries.shape} and "
            f"keys {keys.shape}.{_by_head('queries') if swapped else ''}"
        )


def check_sink_logits(sink_logits: Any, queries: Any) -> None:
    """Raises ``ValueError`` unless there is one for each head of queries; ``None`` passes."""
    if sink_logits is None:
        return
    checks.check_floating("sink_logits", sink_logits)
    if sink_logits.shape != queries.shape[2:3]:
        raise ValueError(
            f"sink_logits must have shape [heads] {queries.shape[2:3]}; got sink_logits "
            f"{sink_logits.shape} and queries {queries.shape}."
        )


def check_decoding(inputs_q: Any, inputs_k: Any, inputs_v: Any, mask: Any) -> None:
    """Raises ``ValueError`` unless these can be decoded."""
    if inputs_k is not None or inputs_v is not None:
        name = "inputs_k" if inputs_k is not None else "inputs_v"
        raise ValueError(f"{name} must be None with decode: attention is of inputs_q to itself.")
    if mask is not None:
        raise ValueError("mask must be None with decode: it is causal; lengths tell of padding.")
    if inputs_q.ndim != 3:
        raise ValueError(f"inputs_q must be [batch, length, features], got {inputs_q.shape}.")
    checks.check_unsharded("inputs_q", inputs_q, 1)


def check_module_scale(compressor: Compressor | None, head_dim: int) -> None:
    """Raises ``ValueError`` unless a compressor has the scale of a module, or none at all."""
    scale = None if compressor is None else compressor.coreset_scale
    if differ(scale, default_scale(head_dim)):
        raise ValueError(
            "compressor must have no softmax scale other than that of the module, 1/sqrt(head_dim) "
            f"= {default_scale(head_dim):g}; got {scale}."
        )


def check_rope(rope_base: float | None, head_dim: int) -> None:
    """Raises ``ValueError`` unless heads of this width can be rotated."""
    if rope_base is not None and head_dim % 2:
        raise ValueError(f"rope_base needs an even head_dim, got {head_dim}.")
