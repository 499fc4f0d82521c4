"""A compressed document in front of a cache: what sequences of a layer begin with."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax._src.attention import PartialAttention
from coreset_jax._src.core.packed import PackedCoreset, partial_attention_packed, with_slots
from coreset_jax.prefixes import Prefix


class LayerPrefix(NamedTuple):
    """What a layer holds of the documents that its sequences begin with.

    Attributes:
      pairs: the pairs of each sequence's document, packed, ``[batch, slots, ...]``; or of one that
        all of them share, ``[1, slots, ...]``.
      lengths: tokens of each document, ``[batch]`` or ``[1]``. The next token has this position.
    """

    pairs: PackedCoreset
    lengths: Int[Array, " documents"]


def of_layer(prefixes: Prefix | Sequence[Prefix], layer: int) -> LayerPrefix:
    """One layer of a prefix that all sequences share, or of one prefix a sequence.

    Args:
      prefixes: the prefix, or one for each sequence of a batch, of the same model.
      layer: the layer's number.

    Raises:
      ValueError: if there are no prefixes or no such layer, or they are of different models, or
        differ in heads, page sizes, widths or dtypes.
    """
    each = [prefixes] if isinstance(prefixes, Prefix) else list(prefixes)
    if not each:
        raise ValueError("prefixes must not be empty.")
    if len({prefix.model for prefix in each}) > 1:
        raise ValueError(f"prefixes must be of one model, got {sorted({p.model for p in each})}.")
    counts = {len(prefix.layers) for prefix in each}
    if len(counts) > 1 or not 0 <= layer < min(counts):
        raise ValueError(f"prefixes must all have a layer {layer}; they have {sorted(counts)}.")
    packed = [prefix.layers[layer] for prefix in each]
    kinds = {
        (
            pairs.num_heads,
            pairs.page_size,
            *(array.shape[-1] for array in (pairs.keys, pairs.values)),
            *(str(array.dtype) for array in (pairs.keys, pairs.values)),
            pairs.scale is None,
        )
        for pairs in packed
    }
    if len(kinds) > 1:
        raise ValueError(
            "prefixes must have the same heads, page size, widths and dtypes, and all or none a "
            f"scale; got {sorted(kinds)}."
        )
    slots = max(pairs.keys.shape[0] for pairs in packed)
    rows = [with_slots(pairs, slots) for pairs in packed]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    return LayerPrefix(stacked, jnp.asarray([prefix.length for prefix in each], jnp.int32))


def partial_attention(
    rows: Float[Array, "batch kv_heads rows head_dim"],
    prefix: LayerPrefix,
    scale: float,
    soft_cap: float | None,
) -> PartialAttention:
    """Attention of all sequences over their documents, ready to be merged with what follows."""
    documents, sequences = prefix.lengths.shape[0], rows.shape[0]
    if documents == sequences:
        return partial_attention_packed(rows, prefix.pairs, scale=scale, soft_cap=soft_cap)
    # One document is read once for all: their queries are those of one sequence.
    _, heads, count, width = rows.shape
    together = rows.swapaxes(0, 1).reshape(1, heads, sequences * count, width)
    state = partial_attention_packed(together, prefix.pairs, scale=scale, soft_cap=soft_cap)

    def apart(each: Array) -> Array:
        return each.reshape(heads, sequences, count, *each.shape[3:]).swapaxes(0, 1)

    return PartialAttention(*map(apart, state))
