"""Compressors around other compressors: a cache cut into chunks, and its ends kept as they are."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from coreset_jax._src import checks
from coreset_jax._src.core.compressor import Wrapper
from coreset_jax._src.core.coreset import (
    AnyCoreset,
    Coreset,
    SignedCoreset,
    concatenated,
    emptied,
    with_normalizers,
)
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info

# Slots for every sink: of a few, sinks would leave nothing for all the rest.
_SLOTS_A_SINK = 8

# A middle of many pairs is a multiple of a power of two, at most the first of these and at most its
# own number over the second: cut into equal chunks it then leaves no slot empty.
_ROUNDEST, _ROUNDING = 32, 64


def chunk_count(size: int, chunk_size: int) -> int:
    """Chunks for ``size`` pairs, so that none keeps more than ``chunk_size``.

    The fewest, or up to twice as many if these share the size evenly.
    """
    fewest = -(-size // chunk_size)
    even = [count for count in range(fewest, 2 * fewest + 1) if size % count == 0]
    return even[0] if even else fewest


class chunked(Wrapper):  # noqa: N801
    """Cuts a cache into consecutive chunks, of which a compressor keeps only so many pairs each.

    A fit solves for all pairs that it is given at once, in time that grows with the cube of their
    number and memory with its square. Cut into chunks of nearly equal length, each with its share
    of the size, time and memory are linear in the length.

    Args:
      compressor: what compresses the chunks, each in units of its own.
      chunk_size: most pairs that are kept of a chunk; up to that size nothing is cut.

    A compressor; see :class:`coreset_jax.Compressor`. If no number of chunks up to twice the least
    one divides ``size``, the remainder of that division stays empty.

    Raises:
      ValueError: on bad options.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.chunked(cj.refit.move_keys(cj.pivoted()), chunk_size=32)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> print((coreset.indices < 256).sum(axis=-1))
    [32 32 32 32]
    """

    chunk_size: int = 512

    @property
    def composite(self) -> bool:  # type: ignore[override]
        """Chunks go through the inner compressor in its own turns."""
        return True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("chunk_size")

    def fills(self, size: int) -> bool:
        """Whether slots divide evenly among chunks that have none empty."""
        chunks = chunk_count(size, self.chunk_size)
        return size % chunks == 0 and self.compressor.fills(size // chunks)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Compresses the chunks and puts them together."""
        chunks = chunk_count(size, self.chunk_size)
        if chunks == 1:
            return self.compressor.on_head(head, size)
        # A chunk is as long as its neighbors to one pair, which is padding in the shorter ones.
        even = not head.ragged and head.count % chunks == 0
        width = -(-head.count // chunks)
        edges = jnp.arange(chunks + 1, dtype=jnp.int32)
        # In this order the product stays below 2^31.
        stops = edges * (head.length // chunks) + edges * (head.length % chunks) // chunks
        starts, lengths = stops[:-1], jnp.diff(stops)
        offsets = jnp.arange(width, dtype=jnp.int32)
        places = jnp.minimum(starts[:, None] + offsets[None], head.count - 1)

        def cut(array: Array) -> Array:
            return array.reshape(chunks, width, -1) if even else array[places]

        def compress(
            number: Array,
            keys: Array,
            values: Array,
            scores: Array | None,
            log_weights: Array | None,
            length: Array,
        ) -> tuple[Coreset, Info]:
            chunk = head.part(
                number=number,
                keys=keys,
                values=values,
                scores=scores,
                log_weights=log_weights,
                length=length,
                ragged=not even,
            )
            return self.compressor.on_head(chunk, size // chunks)

        numbers = head.number * chunks + edges[:-1]
        scores, log_weights = (
            None if each is None else cut(each).reshape(chunks, width)
            for each in (head.scores, head.log_weights)
        )
        coresets, info = jax.vmap(compress)(
            numbers,
            cut(head.keys),
            cut(head.values),
            scores,
            log_weights,
            jnp.maximum(lengths, 1),
        )
        # A head of fewer pairs than chunks leaves some of them empty.
        absent = (coresets.indices < 0) | (lengths == 0)[:, None]
        coresets = _shifted(coresets, starts[:, None])
        if head.ragged:
            coresets = emptied(coresets, absent)
        flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), coresets)
        return concatenated([flat], size), info.of_parts()


def _shifted(coreset: AnyCoreset, places: Array | int) -> AnyCoreset:
    """The coreset of a part as one of the whole; where slots divide unevenly, some are empty."""
    indices = coreset.indices
    return coreset._replace(indices=jnp.where(indices < 0, -1, indices + places))


def end_counts(size: int, sinks: int, recent_fraction: float) -> tuple[int, int]:
    """How many of ``size`` slots go to the first pairs, and how many to the last."""
    sinks = min(sinks, size // _SLOTS_A_SINK)
    middle = max(size - sinks - int(recent_fraction * size), 1)
    if recent_fraction:
        middle -= middle % min(_ROUNDEST, 1 << max(middle // _ROUNDING, 1).bit_length() - 1)
    return sinks, size - sinks - middle


class keep_ends(Wrapper):  # noqa: N801
    r"""Keeps the first and the last pairs of a cache as they are, and compresses those between.

    .. math:: S = \{1, \dots, s\} \cup S' \cup \{n - r + 1, \dots, n\}, \qquad
              w_i = 1 \text{ at both ends}

    with :math:`S'` what the compressor makes of :math:`m - s - r` slots. Later queries attend
    mostly to the newest tokens, and many models to their first ones whatever they ask: an error
    there reaches every query, and costs few slots to avoid.

    Args:
      compressor: what compresses the pairs between.
      sinks: :math:`s`, the first pairs that are kept; of few slots no more than an eighth.
      recent_fraction: the share of the slots that goes to the last pairs, at least 0 and below 1.
        It is rounded down to a number of slots, and up to where the others are a round number.

    A compressor; see :class:`coreset_jax.Compressor`. Pairs of both ends are bit-identical to the
    source and have weight one. With ``lengths``, the last pairs are those of each head.

    Raises:
      ValueError: on bad options.

    References:
      Xiao, Tian, Chen, Han, Lewis, *Efficient Streaming Language Models with Attention Sinks*,
      ICLR 2024, arXiv 2309.17453.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 512, 16))
    >>> compressor = cj.keep_ends(cj.balanced(), sinks=2, recent_fraction=0.125)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=32)
    >>> print(coreset.indices[0, :2], coreset.indices[0, -4:])
    [0 1] [508 509 510 511]
    """

    sinks: int = 4
    recent_fraction: float = 0.125

    @property
    def composite(self) -> bool:  # type: ignore[override]
        """What lies between goes through the inner compressor in its own turns."""
        return True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("sinks", 0)
        fraction = checks.static_part("recent_fraction", self.recent_fraction)
        object.__setattr__(self, "recent_fraction", fraction)

    def fills(self, size: int) -> bool:
        """Whether no slot between the ends is empty."""
        sinks, recent = end_counts(size, self.sinks, self.recent_fraction)
        return self.compressor.fills(size - sinks - recent)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Compresses what lies between the ends, and puts them on either side of it."""
        sinks, recent = end_counts(size, self.sinks, self.recent_fraction)
        stop = head.count if head.ragged else head.count - recent
        between = head.part(
            keys=head.keys[sinks:stop],
            values=head.values[sinks:stop],
            **{
                name: None if array is None else array[sinks:stop]
                for name, array in (("scores", head.scores), ("log_weights", head.log_weights))
            },
            length=jnp.maximum(head.length - sinks - recent, 1),
        )
        middle, info = self.compressor.on_head(between, size - sinks - recent)
        middle = _shifted(middle, sinks)
        if head.ragged:
            # A short head has nothing between its ends, and what was taken for it is one of them.
            absent = (middle.indices < 0) | (head.length <= sinks + recent)
            middle = emptied(middle, absent)

        def end(places: Int[Array, " r"], valid: Array) -> Any:
            own = head.log_masses[jnp.clip(places, 0, head.count - 1)]
            places = jnp.where(valid, places, -1) if head.ragged else places
            pairs = head.pairs(places, own.astype(middle.log_weights.dtype))
            if isinstance(middle, SignedCoreset):
                return with_normalizers(pairs, jnp.exp(pairs.log_weights))
            return pairs

        first = jnp.arange(sinks, dtype=jnp.int32)
        last = head.length - recent + jnp.arange(recent, dtype=jnp.int32)
        ends = end(first, first < head.length), end(last, last >= sinks)
        return concatenated([ends[0], middle, ends[1]], size), info
