"""Heads that keep different numbers of pairs, in one array of pages without empty slots."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from coreset_jax._src import checks, meshes
from coreset_jax._src.attention import PartialAttention, partial_attention
from coreset_jax._src.core.coreset import Coreset, SignedCoreset, emptied
from coreset_jax._src.core.scale import reading_scale

Result = TypeVar("Result")

# Numbers of scores and outputs of pages that are held at a time.
_NUMBERS = 2**24


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["keys", "values", "log_weights", "indices", "offsets", "scale"],
    meta_fields=["page_size"],
)
@dataclasses.dataclass(frozen=True)
class PackedCoreset:
    """A coreset whose heads lie one behind the other, each in as many slots as it has pairs.

    A head has whole pages, the last of which may have empty slots; behind the last head may be
    empty pages. So lie the pairs of ragged and of paged attention kernels. All arrays may have
    further axes in front, those of a batch: each of its entries has as many slots, and its own
    offsets.

    Attributes:
      keys: keys of all heads ``[..., slots, d]``.
      values: values of all heads ``[..., slots, dv]``.
      log_weights: as in a :class:`coreset_jax.Coreset`, ``[..., slots]``; ``-inf`` in an empty
        slot.
      indices: positions in the source ``[..., slots]``, int32; -1 in an empty slot.
      offsets: where heads begin, and the last one ends ``[..., heads + 1]``, int32.
      page_size: slots a page; offsets are multiples of it.
      scale: as in a :class:`coreset_jax.Coreset`, ``[..., heads]``.
    """

    keys: Float[Array, "*batch slots d"]
    values: Float[Array, "*batch slots dv"]
    log_weights: Float[Array, "*batch slots"]
    indices: Int[Array, "*batch slots"]
    offsets: Int[Array, "*batch bounds"]
    page_size: int
    scale: Float[Array, "*batch heads"] | None = None

    @property
    def num_heads(self) -> int:
        """Heads that lie one behind the other."""
        return self.offsets.shape[-1] - 1

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


def pack(coreset: Coreset, *, page_size: int = 16, num_slots: int | None = None) -> PackedCoreset:
    """The pairs of a coreset without its empty slots, the heads of its last leading axis in a row.

    Args:
      coreset: a coreset ``[..., heads, m]`` whose heads may have different numbers of pairs, as of
        ``cj.attended(axes=...)``; not signed.
      page_size: slots a page. A head has half a page of empty slots in the mean.
      num_slots: slots of the result, a multiple of ``page_size``; ``None`` means as many as the
        pairs need, of the entry of the batch that needs most, which must be known then. Under
        ``jit`` the most that a budget allows is ``heads * (size + page_size)``.

    Returns:
      The packed coreset, ``[..., num_slots]``. Its log-weights are NaN if ``num_slots`` are too few
      and pairs are traced.

    Raises:
      ValueError: if the coreset has no heads or is signed, if pairs are traced and ``num_slots`` is
        not given, or if they do not fit.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 4, 512, 16))
    >>> coreset = cj.attended(axes=0)(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> coreset.keys.shape, cj.pack(coreset).keys.shape
    ((4, 512, 16), (288, 16))
    """
    if isinstance(coreset, SignedCoreset):
        raise ValueError("coreset must not be signed: normalizers are not packed.")
    shape = coreset.log_weights.shape
    if len(shape) < 2:
        raise ValueError(f"coreset must have log_weights [..., heads, m]; got {shape}.")
    checks.check_count("page_size", page_size)
    if meshes.explicit_mesh(coreset) is not None:
        raise ValueError(
            "coreset must not lie on a mesh of Explicit axes: heads of several devices are no row "
            "of pages. Pack those of each device, inside jax.shard_map."
        )
    counts = jnp.sum(coreset.log_weights != -jnp.inf, axis=-1, dtype=jnp.int32)
    needed = _most_slots(np.asarray(counts), page_size) if checks.is_known(counts) else None
    if num_slots is None:
        if needed is None:
            raise ValueError("num_slots must be given where the coreset is traced.")
        num_slots = needed
    checks.check_count("num_slots", num_slots)
    if num_slots % page_size:
        raise ValueError(f"num_slots must be a multiple of {page_size}, got {num_slots}.")
    if needed is not None and needed > num_slots:
        raise ValueError(f"num_slots must be at least {needed} for these pairs, got {num_slots}.")
    return _pack(coreset, counts, page_size, num_slots)


def _over_entries(function: Callable[..., Result], axes: int) -> Callable[..., Result]:
    """A function of one entry of a batch, for all entries along so many leading axes."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def _most_slots(counts: np.ndarray, page_size: int) -> int:
    """Slots of the batch entry that needs most, at least a page."""
    pages = -(-counts // page_size)
    return int(max(pages.sum(axis=-1).max(initial=1), 1)) * page_size


@functools.partial(jax.jit, static_argnames=("page_size", "num_slots"))
def _pack(
    coreset: Coreset, counts: Int[Array, "*batch heads"], page_size: int, num_slots: int
) -> PackedCoreset:
    def of_entry(coreset: Coreset, counts: Int[Array, " heads"]) -> PackedCoreset:
        order = jnp.argsort(coreset.log_weights == -jnp.inf, axis=-1, stable=True)
        pages = -(-counts // page_size)
        offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(pages) * page_size])
        offsets = offsets.astype(jnp.int32)
        slots = jnp.arange(num_slots, dtype=jnp.int32)
        heads = head_of(slots, offsets)
        ranks = slots - offsets[heads]
        inside = ranks < counts[heads]
        places = order[heads, jnp.minimum(ranks, order.shape[1] - 1)]
        kept = emptied(Coreset(*(leaf[heads, places] for leaf in coreset[:4])), ~inside)
        fits = offsets[-1] <= num_slots
        log_weights = jnp.where(fits, kept.log_weights, jnp.nan)
        return PackedCoreset(
            kept.keys,
            kept.values,
            log_weights,
            kept.indices,
            offsets,
            page_size,
            coreset.scale,
        )

    return _over_entries(of_entry, counts.ndim - 1)(coreset, counts)


def head_of(slots: Int[Array, " slots"], offsets: Int[Array, " bounds"]) -> Int[Array, " slots"]:
    """The head that a slot belongs to; behind all heads, the last one."""
    heads = jnp.searchsorted(offsets, slots, side="right", method="compare_all") - 1
    return jnp.clip(heads, 0, offsets.shape[0] - 2).astype(jnp.int32)


def unpack(packed: PackedCoreset, *, size: int) -> Coreset:
    """The coreset with as many slots for every head, its empty slots last.

    Args:
      packed: a packed coreset ``[..., slots]``.
      size: slots a head of the result. Pairs of a head that has more than that are left out, and
        its log-weights are NaN.

    Returns:
      The coreset ``[..., heads, size]``.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> coreset = cj.balanced()(jax.random.key(1), keys, values, size=64)
    >>> bool((cj.unpack(cj.pack(coreset), size=64).indices == coreset.indices).all())
    True
    """
    checks.check_size(size)

    def of_entry(packed: PackedCoreset) -> Coreset:
        starts, ends = packed.offsets[:-1, None], packed.offsets[1:, None]
        slots = starts + jnp.arange(size, dtype=jnp.int32)[None]
        places = jnp.minimum(slots, packed.keys.shape[0] - 1)
        fields = (packed.keys, packed.values, packed.log_weights, packed.indices)
        coreset = emptied(Coreset(*(field[places] for field in fields)), slots >= ends)
        coreset = coreset._replace(scale=packed.scale)
        held = jnp.arange(packed.keys.shape[0], dtype=jnp.int32)
        ranks = held - packed.offsets[head_of(held, packed.offsets)]
        lost = (ranks >= size) & (packed.log_weights != -jnp.inf) & (held < packed.offsets[-1])
        heads = jnp.arange(packed.num_heads, dtype=jnp.int32)
        cut = jnp.any(lost[None] & (head_of(held, packed.offsets)[None] == heads[:, None]), axis=1)
        return coreset._replace(log_weights=jnp.where(cut[:, None], jnp.nan, coreset.log_weights))

    return _over_entries(of_entry, packed.offsets.ndim - 1)(packed)


def check_packed_queries(queries: Array, packed: PackedCoreset) -> None:
    """Raises ``ValueError`` unless queries ``[..., heads, q, d]`` fit a packed coreset."""
    checks.check_floating("queries", queries)
    leading = (*packed.offsets.shape[:-1], packed.num_heads)
    width = packed.keys.shape[-1]
    if (*queries.shape[:-2], queries.shape[-1]) != (*leading, width):
        raise ValueError(
            f"queries must be [..., heads, q, d] with heads {leading} and width {width}, got "
            f"{queries.shape}."
        )


def with_slots(packed: PackedCoreset, slots: int) -> PackedCoreset:
    """The same pairs with empty pages behind them, up to so many slots."""
    room = slots - packed.keys.shape[-2]
    axis = packed.indices.ndim - 1

    def widened(leaf: Array, filling: float = 0) -> Array:
        widths = [(0, 0)] * leaf.ndim
        widths[axis] = (0, room)
        return jnp.pad(leaf, widths, constant_values=filling)

    return dataclasses.replace(
        packed,
        keys=widened(packed.keys),
        values=widened(packed.values),
        log_weights=widened(packed.log_weights, -jnp.inf),
        indices=widened(packed.indices, -1),
    )


def partial_attention_packed(
    queries: Float[Array, "*batch heads q d"],
    packed: PackedCoreset,
    *,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
) -> PartialAttention:
    r"""Attention over packed pairs, ready to be merged with other pairs.

    Every page is read by the queries of its head, and the pages of a head are merged:

    .. math:: M = \max_p M_p, \quad t = \sum_p e^{M_p - M} t_p, \quad o = \sum_p e^{M_p - M} o_p

    Work and memory are those of the slots there are, whatever the offsets.

    Args:
      queries: queries ``[..., heads, q, d]``.
      packed: the packed coreset ``[..., slots]``.
      scale: the softmax scale, a scalar or ``[..., heads]``; ``None`` means that of the coreset,
        and ``1/sqrt(d)`` if it has none.
      soft_cap: the cap of scores, see :func:`coreset_jax.attention`.

    Returns:
      The partial state ``[..., heads, q]``, in float32 or wider.

    Raises:
      ValueError: if the scale is not the coreset's.
    """
    scale = reading_scale(packed.scale, scale, queries.shape[:-2])
    if scale is not None:
        scale = jnp.broadcast_to(jnp.asarray(scale), queries.shape[:-2])
    entries = math.prod(packed.offsets.shape[:-1])
    over_pages = functools.partial(_over_pages, soft_cap=soft_cap, entries=entries)
    return _over_entries(over_pages, packed.offsets.ndim - 1)(queries, packed, scale)


def _over_pages(
    queries: Float[Array, "heads q d"],
    packed: PackedCoreset,
    scale: Float[Array, " heads"] | None,
    soft_cap: ArrayLike | None,
    entries: int,
) -> PartialAttention:
    """Attention over one of so many entries of a batch, which are read together."""
    count, heads = queries.shape[1], packed.num_heads
    pages = packed.keys.shape[0] // packed.page_size

    def paged(array: Array) -> Array:
        return array.reshape(pages, packed.page_size, *array.shape[1:])

    firsts = jnp.arange(pages, dtype=jnp.int32) * packed.page_size
    owners = head_of(firsts, packed.offsets)
    scales = None if scale is None else scale[owners]

    def reduced(segment: Callable[..., Array], each: Array) -> Array:
        return segment(each, owners, num_segments=heads, indices_are_sorted=True)

    def read(queries: Float[Array, "heads q d"]) -> PartialAttention:
        states = partial_attention(
            queries[owners],
            paged(packed.keys),
            paged(packed.values),
            paged(packed.log_weights),
            scale=scales,
            soft_cap=soft_cap,
        )
        maximum = reduced(jax.ops.segment_max, states.maximum)
        shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
        factors = jnp.exp(states.maximum - shift[owners])
        return PartialAttention(
            maximum,
            reduced(jax.ops.segment_sum, factors * states.total),
            reduced(jax.ops.segment_sum, factors[..., None] * states.output),
        )

    widths = packed.page_size + packed.keys.shape[-1] + packed.values.shape[-1]
    at_once = max(_NUMBERS // (entries * pages * widths), 1)
    if count <= at_once:
        return read(queries)
    states = jax.lax.map(
        lambda query: read(query[:, None]), queries.swapaxes(0, 1), batch_size=at_once
    )
    return jax.tree.map(lambda each: jnp.moveaxis(each[:, :, 0], 0, 1), states)
