"""The parts of attentions of ``google-tunix``, known by their names, and what their masks say."""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from coreset_jax._src import checks


class Parts(NamedTuple):
    """The names that a family of models gives to the parts of an attention."""

    projections: tuple[str, ...]
    norms: tuple[str, ...]
    output: str


_FAMILIES = (
    Parts(("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm"), "o_proj"),
    Parts(("q_einsum", "kv_einsum"), ("_query_norm", "_key_norm"), "attn_vec_einsum"),
    Parts(("qkv_einsum",), ("_query_norm", "_key_norm"), "attn_vec_einsum"),
)

# Options of the function that applies rotary positions, and where an attention keeps them.
_ROTARY = {
    "head_dim": "head_dim",
    "base_frequency": "rope_base_frequency",
    "scale_factor": "rope_scale_factor",
}


def is_local(attention: Any) -> bool:
    """Whether an attention sees a sliding window of the sequence only."""
    kind = getattr(attention, "attn_type", None)
    return "LOCAL" in getattr(kind, "name", "")


def parts_of(attention: Any) -> Parts:
    """The parts of an attention, all of which the wrapper uses."""
    name = type(attention).__name__
    for parts in _FAMILIES:
        needed = (*parts.projections, parts.output)
        if all(getattr(attention, part, None) is not None for part in needed):
            break
    else:
        raise ValueError(f"attention {name} must have the parts of one of {_FAMILIES}.")
    norms = tuple(part for part in parts.norms if getattr(attention, part, None) is not None)
    if len(norms) == 1:
        raise ValueError(f"attention {name} must norm both queries and keys; it has {norms}.")
    used = {*needed, *norms}
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(attention))]
    left_out = sorted(".".join(map(str, path)) for path in paths if path[0] not in used)
    if left_out:
        raise ValueError(f"attention {name} has variables that are not supported: {left_out}.")
    return parts._replace(norms=norms)


@dataclasses.dataclass(frozen=True)
class _WithOptions:
    """A function with keywords given; unlike ``functools.partial`` it equals others like it."""

    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *arguments: Any) -> Array:
        return self.function(*arguments, **dict(self.options))


def rotary(attention: Any) -> Callable[..., Array]:
    """The function that applies rotary positions: the one that the attention itself calls."""
    function = getattr(sys.modules[type(attention).__module__], "apply_rope", None)
    if function is None:
        raise ValueError(f"the module of {type(attention).__name__} must define apply_rope.")
    options = tuple(
        (name, getattr(attention, at)) for name, at in _ROTARY.items() if hasattr(attention, at)
    )
    return _WithOptions(function, options)


def scale_of(attention: Any) -> float:
    """The softmax scale of an attention, under one of its names."""
    for name in ("scale", "query_pre_attn_scalar"):
        if getattr(attention, name, None) is not None:
            return float(getattr(attention, name))
    raise ValueError(f"attention {type(attention).__name__} must say its scale.")


def project(attention: Any, inputs: Array, positions: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of inputs ``[batch, tokens, heads, head_dim]``, rotated."""
    parts = attention.coreset_parts
    projected: list[Array] = []
    for name in parts.projections:
        output = getattr(attention, name)(inputs)
        projected += [output] if output.ndim == 4 else list(output)
    queries, keys, values = projected
    if parts.norms:
        query_norm, key_norm = (getattr(attention, name) for name in parts.norms)
        queries, keys = query_norm(queries), key_norm(keys)
    rotate = attention.coreset_rotate
    return rotate(queries, positions), rotate(keys, positions), values


def read_mask(
    mask: Array | None, shape: tuple[int, ...], end_index: Array, held: Array
) -> tuple[Bool[Array, "batch tokens"] | None, Bool[Array, " batch"]]:
    """Which tokens are no padding, ``None`` for all, and whether the mask is else causal."""
    batch, count = shape
    if mask is None:
        return None, jnp.ones(batch, bool)
    if mask.ndim != 3 or mask.shape[0] not in (1, batch) or mask.shape[1] != count:
        raise ValueError(f"attn_mask must be [batch, tokens, slots] {shape}, got {mask.shape}.")
    slots = mask.shape[2]
    if slots < count:
        raise ValueError(f"attn_mask must have a slot for each of {count} tokens; got {slots}.")
    mask = jnp.broadcast_to(mask.astype(bool), (batch, count, slots))
    block = mask if slots == count else jax.lax.dynamic_slice_in_dim(mask, end_index[0], count, 2)
    real = jnp.diagonal(block, axis1=1, axis2=2)
    expected = real[:, None, :] & jnp.tri(count, dtype=bool)[None]
    fits = jnp.all(block == expected, axis=2)
    if slots > count:
        fits &= jnp.sum(mask, axis=2) - jnp.sum(block, axis=2) == held[:, None]
    # Outputs of padding are not used, whatever it sees.
    supported = jnp.all(fits | ~real, axis=1)
    if not checks.is_traced(supported) and not jnp.all(supported):
        raise ValueError(
            "attn_mask must be causal and show every token that the cache holds; "
            "padding is a token that may not see itself."
        )
    return real, supported
