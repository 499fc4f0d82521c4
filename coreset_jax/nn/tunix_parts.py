"""The parts of attentions of ``google-tunix``, known by their names, and what their masks say."""

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool

from coreset_jax._src import checks
from coreset_jax._src.attention import default_scale


class Parts(NamedTuple):
    """The names that a family of models gives to the parts of an attention.

    Attributes:
      projections: of queries, keys and values, one for each, or fewer that return several. Where
        none returns values, they are the keys before norm and rotation.
      norms: of queries and keys.
      output: the output projection.
      biases: of queries, keys and values.
      norms_values: whether values are divided by their root mean square.
    """

    projections: tuple[str, ...]
    norms: tuple[str, ...]
    output: str
    biases: tuple[str, ...] = ()
    norms_values: bool = False


_NORMS, _BIASES = ("_query_norm", "_key_norm"), ("q_bias", "k_bias", "v_bias")
_FAMILIES = (
    Parts(("q_proj", "k_proj", "v_proj"), ("q_norm", "k_norm"), "o_proj", _BIASES),
    Parts(("q_einsum", "kv_einsum"), _NORMS, "attn_vec_einsum"),
    Parts(("q_einsum", "k_einsum"), _NORMS, "attn_vec_einsum"),
    Parts(("qkv_einsum",), _NORMS, "attn_vec_einsum"),
)

# Options of the function that applies rotary positions, and where an attention keeps them.
_ROTARY = {
    "head_dim": "head_dim",
    "base_frequency": "rope_base_frequency",
    "scale_factor": "rope_scale_factor",
    "rope_proportion": "rope_proportion",
}

# What attentions have that cache latents, of which keys and values are made.
_LATENT = ("kv_lora_rank", "kv_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "wkv_a", "wkv_b")


def is_local(attention: Any) -> bool:
    """Whether an attention sees a sliding window of the sequence only."""
    kind = getattr(attention, "attn_type", None)
    return "LOCAL" in getattr(kind, "name", "")


def takes(attention: Any, name: str) -> bool:
    """Whether an attention is called with an argument of this name."""
    return name in inspect.signature(type(attention).__call__).parameters


def parts_of(attention: Any) -> Parts:
    """The parts of an attention, all of which the wrapper uses."""
    name = type(attention).__name__
    latent = [part for part in _LATENT if hasattr(attention, part)]
    if latent:
        raise ValueError(
            f"attention {name} is latent: it has {latent}, and its values are a part of its keys, "
            "which a wrapper would cache twice and compress apart. Compress its latents as keys "
            "by a method that keeps pairs, such as coreset_jax.balanced."
        )
    for parts in _FAMILIES:
        needed = (*parts.projections, parts.output)
        if all(getattr(attention, part, None) is not None for part in needed):
            break
    else:
        raise ValueError(f"attention {name} must have the parts of one of {_FAMILIES}.")
    norms, biases = (
        tuple(part for part in some if getattr(attention, part, None) is not None)
        for some in (parts.norms, parts.biases)
    )
    if len(norms) == 1:
        raise ValueError(f"attention {name} must norm both queries and keys; it has {norms}.")
    if len(biases) not in (0, 3):
        raise ValueError(f"attention {name} must have all of {_BIASES} or none; it has {biases}.")
    used = {*needed, *norms, *biases}
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(attention))]
    left_out = sorted(".".join(map(str, path)) for path in paths if path[0] not in used)
    if left_out:
        raise ValueError(f"attention {name} has variables that are not supported: {left_out}.")
    # Only Gemma 4 does both, neither of which has parameters that could tell.
    norms_values = takes(attention, "kv_shared_cache")
    return parts._replace(norms=norms, biases=biases, norms_values=norms_values)


@dataclasses.dataclass(frozen=True)
class _WithOptions:
    """A function with keywords given; unlike ``functools.partial`` it equals others like it."""

    function: Callable[..., Array]
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *arguments: Any) -> Array:
        return self.function(*arguments, **dict(self.options))


def rotary(attention: Any) -> Callable[..., Array]:
    """The function that applies rotary positions: the one that the attention itself calls.

    It takes queries or keys, and what the attention is told of positions.
    """
    name = "apply_rotary_embedding" if takes(attention, "sin") else "apply_rope"
    function = getattr(sys.modules[type(attention).__module__], name, None)
    if function is None:
        raise ValueError(f"the module of {type(attention).__name__} must define {name}.")
    known = inspect.signature(function).parameters
    options = tuple(
        (name, getattr(attention, at))
        for name, at in _ROTARY.items()
        if name in known and hasattr(attention, at)
    )
    return _WithOptions(function, options)


def scale_of(attention: Any) -> float:
    """The softmax scale of an attention, under one of its names or, in Gemmas, by their code."""
    for name in ("scale", "query_pre_attn_scalar"):
        if getattr(attention, name, None) is not None:
            return float(getattr(attention, name))
    if hasattr(attention, "attn_logits_soft_cap"):  # Gemma and Gemma 2.
        return default_scale(attention.head_dim)
    if takes(attention, "kv_shared_cache"):  # Gemma 4.
        return 1.0
    raise ValueError(f"attention {type(attention).__name__} must say its scale.")


def soft_cap_of(attention: Any) -> float | None:
    """The soft cap of an attention's scores, ``None`` without one."""
    return getattr(attention, "attn_logits_soft_cap", None)


def project(attention: Any, inputs: Array, *places: Array) -> tuple[Array, Array, Array]:
    """Queries, keys and values of inputs ``[batch, tokens, heads, head_dim]``, rotated.

    Args:
      attention: a wrapped attention.
      inputs: inputs ``[batch, tokens, features]``.
      *places: what the attention is told of positions: themselves, or sines and cosines.
    """
    parts = attention.coreset_parts
    projected: list[Array] = []
    for name in parts.projections:
        output = getattr(attention, name)(inputs)
        projected += [output] if output.ndim == 4 else list(output)
    for i, name in enumerate(parts.biases):
        bias = getattr(attention, name)[...].astype(projected[i].dtype)
        projected[i] = projected[i] + bias.reshape(1, 1, *projected[i].shape[2:])
    queries, keys = projected[:2]
    values = projected[-1]
    if parts.norms_values:
        mean_square = jnp.mean(jnp.square(values), axis=-1, keepdims=True)
        values = values * jax.lax.rsqrt(mean_square + 1e-6)
    if parts.norms:
        query_norm, key_norm = (getattr(attention, name) for name in parts.norms)
        queries, keys = query_norm(queries), key_norm(keys)
    rotate = attention.coreset_rotate
    return rotate(queries, *places), rotate(keys, *places), values


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
