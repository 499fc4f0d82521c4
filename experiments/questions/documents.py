"""Documents as a pretrained model holds them: their pairs, and sample queries from each source.

A document is read once, without the question. Methods differ in what they are given of it:

- nothing but keys and values;
- the queries of the prompt itself, its last ones or all of them moved to where the next tokens will
  stand (`coreset_jax.queries.ahead`), and the scores of these;
- the queries of a reconstruction: the model reads the document once more behind its full cache.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import coreset_jax as cj
from coreset_jax._src.attention import partial_attention
from experiments.model import llama, reading
from experiments.model.pretrained import Pretrained

# The cache is padded to a multiple of this: few lengths make few programs.
PADDING = 128

# Samples a head of each source.
SAMPLES = 1024

# Of the newest positions, those whose queries are the source `last`.
LAST_POSITIONS = 512

# What the model is told before a reconstruction, and tokens that it reads at once for one, as in
# KVzip.
_REPEAT = "\n\nRepeat the text above, word for word.\n\n"
_RECONSTRUCTED_AT_ONCE = 1792


@dataclasses.dataclass
class Document:
    """A text as a model holds it.

    Attributes:
      tokens: the text `[length]`.
      keys: after RoPE `[layers, kv_heads, n, head_dim]`, padded behind `length`.
      values: likewise.
      last: queries of the newest tokens `[layers, kv_heads, q, head_dim]`.
      ahead: all queries of the text, moved behind it: a sample, and the scores of all.
      reconstruction: the same of a reconstruction; `None` if there was none.
      residual: the last residual stream of the text `[length, embed_dim]`.
      seconds: what each pass took.
    """

    tokens: Int[np.ndarray, " length"]
    keys: Float[Array, "layers kv_heads n head_dim"]
    values: Float[Array, "layers kv_heads n head_dim"]
    last: Float[Array, "layers kv_heads q head_dim"]
    ahead: cj.queries.Observed
    reconstruction: cj.queries.Observed | None
    residual: Float[Array, "length embed_dim"]
    seconds: dict[str, float]

    @property
    def length(self) -> int:
        """Tokens."""
        return len(self.tokens)

    @functools.cached_property
    def lengths(self) -> Int[Array, "layers kv_heads"]:
        """Valid pairs of every head."""
        return jnp.full(self.keys.shape[:2], self.length, jnp.int32)

    @property
    def nbytes(self) -> int:
        """Bytes of the full cache, without padding."""
        return sum(each[..., : self.length, :].nbytes for each in (self.keys, self.values))

    def size_at(self, ratio: int) -> int:
        """Pairs a head, in the mean, that a method may keep at a ratio."""
        return max(self.keys.shape[-2] // ratio, 1)

    def compressed(
        self, compressor: cj.Compressor, source: str, *, ratio: int, seed: int
    ) -> cj.Coreset:
        """The coreset of the cache by a method that is given a source; see `SOURCES`."""
        coreset: cj.Coreset = jax.block_until_ready(
            compressor(
                jax.random.key(seed),
                self.keys,
                self.values,
                size=self.size_at(ratio),
                lengths=self.lengths,
                **self.given(source),
            )
        )
        return coreset

    def given(self, source: str) -> dict[str, Array]:
        """What a method is called with that knows this much; see `SOURCES`.

        Raises:
          ValueError: there was no reconstruction, or the source is unknown.
        """
        if source == "nothing":
            return {}
        if source == "last":
            return {"queries": self.last}
        if source == "ahead":
            return {"queries": self.ahead.queries, "scores": self.ahead.scores}
        if source not in SOURCES:
            raise ValueError(f"source must be one of {SOURCES}, got {source!r}")
        if self.reconstruction is None:
            raise ValueError(f"source {source!r} needs a document that was reconstructed")
        again = self.reconstruction
        if source == "reconstruction":
            return {"queries": again.queries, "scores": again.scores}
        return {
            "queries": jnp.concatenate([self.ahead.queries, again.queries], axis=-2),
            "scores": jnp.maximum(self.ahead.scores, again.scores),
        }


SOURCES = ("nothing", "last", "ahead", "reconstruction", "both")
"""What methods may be given of a document: nothing but its cache; the newest queries; all queries,
moved ahead; those of a reconstruction; the last two together."""


def read(
    pretrained: Pretrained, tokens: Sequence[int], *, reconstruct: bool, chunk: int = 512
) -> Document:
    """Let a model read a document, and perhaps read it again.

    Args:
      pretrained: the model.
      tokens: the text.
      reconstruct: whether to make the queries of a reconstruction too.
      chunk: tokens that are read at once.

    Raises:
      ValueError: the text is empty or does not fit the model's context.
    """
    model, config = pretrained.model, pretrained.config
    text = np.asarray(tokens, np.int32)
    length, padded = len(text), -(-len(text) // PADDING) * PADDING
    seconds, begun = {}, time.perf_counter()
    frequencies = jnp.asarray(llama.frequencies(config), jnp.float32)
    last, moved = [], []

    def take(queries: Array, keys: Array) -> None:
        last.append(_rows(queries[:, :, -LAST_POSITIONS:]))
        # Gone through again behind the last one: few lengths make few programs.
        places = np.arange(padded) % length
        moved.append(
            _observed(
                cj.queries.ahead(queries[:, :, places], jnp.asarray(places), length, frequencies),
                _padded(keys, padded),
                length,
            )
        )

    consumer = _Layers(length, config.num_kv_heads, take)
    found = reading.read(model, text, chunk=chunk, consumer=consumer)
    keys, values = (_padded(each, padded) for each in found.pairs)
    jax.block_until_ready(moved)
    seconds["prefill"] = time.perf_counter() - begun
    document = Document(
        text, keys, values, jnp.stack(last), _stacked(moved), None, found.residual, seconds
    )
    if reconstruct:
        begun = time.perf_counter()
        again = _reconstructed(pretrained, document, found.pairs, chunk)
        document.reconstruction = jax.block_until_ready(again)
        seconds["reconstruction"] = time.perf_counter() - begun
    return document


def _reconstructed(
    pretrained: Pretrained, document: Document, pairs: reading.Pairs, chunk: int
) -> cj.queries.Observed:
    """What is known of the queries of a model that repeats a document behind its full cache."""
    model, config, length = pretrained.model, pretrained.config, document.length
    cue = pretrained.tokenizer.encode(_REPEAT)
    parts = -(-length // _RECONSTRUCTED_AT_ONCE)
    width = min(-(-length // (parts * PADDING)) * PADDING, length)
    observed: list[cj.queries.Observed] = [
        cj.queries.empty(keys, count=SAMPLES) for keys in document.keys
    ]
    for part in range(parts):
        # Parts are equally long, and the last ones overlap.
        first = (length - width) * part // max(parts - 1, 1)
        layers = iter(range(len(observed)))

        def take(queries: Array, keys: Array, layers: Iterator[int] = layers) -> None:
            layer = next(layers)
            # What they attend to beside the document: the cue, and what was repeated so far.
            visible = jnp.arange(keys.shape[1]) <= len(cue) + jnp.arange(width)[:, None]
            own = partial_attention(
                queries[:, :, len(cue) :], keys[:, None], keys[:, None], visible=visible
            )
            observed[layer] = _observed(
                queries[:, :, len(cue) :],
                document.keys[layer],
                length,
                own.maximum + jnp.log(own.total),
                observed[layer],
            )

        tokens = [*cue, *document.tokens[first : first + width].tolist()]
        consumer = _Layers(len(tokens), config.num_kv_heads, take)
        reading.read(model, np.asarray(tokens), chunk=chunk, consumer=consumer, behind=pairs)
    return _stacked(observed)


class _Layers:
    """A consumer of chunks that hands on all queries and keys of a layer together.

    Attributes:
      length: tokens of the text.
      kv_heads: key-value heads a layer.
      take: is called with `[kv_heads, group, length, head_dim]` and `[kv_heads, length, head_dim]`.
    """

    def __init__(self, length: int, kv_heads: int, take: Callable[[Array, Array], None]) -> None:
        self.length, self.kv_heads, self.take = length, kv_heads, take
        self._chunks: list[reading.Chunk] = []

    def __call__(self, chunk: reading.Chunk) -> None:
        self._chunks.append(chunk)
        if chunk.start + chunk.queries.shape[1] < self.length:
            return
        queries = jnp.concatenate([each.queries for each in self._chunks], axis=1)
        keys = jnp.concatenate([each.keys for each in self._chunks], axis=1)
        self._chunks = []
        self.take(queries.reshape(self.kv_heads, -1, *queries.shape[1:]), keys)


def _padded(pairs: Float[Array, "*heads n d"], count: int) -> Float[Array, "*heads m d"]:
    return jnp.pad(pairs, (*((0, 0),) * (pairs.ndim - 2), (0, count - pairs.shape[-2]), (0, 0)))


def _rows(queries: Float[Array, "kv_heads group q head_dim"]) -> Float[Array, "kv_heads rows d"]:
    """Queries of a group one after another, those of a position side by side."""
    return queries.swapaxes(1, 2).reshape(queries.shape[0], -1, queries.shape[-1])


def _stacked(layers: Sequence[cj.queries.Observed]) -> cj.queries.Observed:
    """What is known of all layers, from what is known of each."""
    return cj.queries.Observed(
        jnp.stack([each.queries for each in layers]),
        jnp.stack([each.scores for each in layers]),
        layers[0].places,
        layers[0].seen,
    )


def _observed(
    queries: Float[Array, "kv_heads group q head_dim"],
    keys: Float[Array, "kv_heads n head_dim"],
    length: int,
    log_others: Float[Array, "kv_heads group q"] | None = None,
    before: cj.queries.Observed | None = None,
) -> cj.queries.Observed:
    """What is known of queries of one layer, after these."""
    start = cj.queries.empty(keys, count=SAMPLES) if before is None else before
    rows = _rows(queries)
    others = None if log_others is None else log_others.swapaxes(1, 2).reshape(len(rows), -1)
    return cj.queries.observe(
        start, rows, keys, lengths=jnp.full(len(keys), length, jnp.int32), log_others=others
    )
