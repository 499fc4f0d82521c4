"""Compactor: leverage of the keys, and what the prompt's own queries attend to near themselves."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from coreset_jax._src import checks
from coreset_jax._src.core.compressor import QueryBall, leaf
from coreset_jax._src.core.head import Head
from coreset_jax._src.geometry.solves import identity_like, regularized_inverse
from coreset_jax._src.precision import inner_products, matmul
from coreset_jax.baselines.scores import KeepAttended
from coreset_jax.queries import ahead, rotary_frequencies

# Added to the diagonal of the keys' Gram matrix, as the authors do; and what it gets at least, in
# units of its mean.
_REGULARIZER, _RIDGE = 5e-3, 1e-6

# Pairs over which attention is averaged, as the authors do.
_POOL = 3


class compactor(KeepAttended):  # noqa: N801
    r"""Keeps keys of large leverage, and with the prompt's queries those that are attended to.

    With :math:`X` the keys less their mean, the leverage of a pair is

    .. math:: o_i = x_i^T (X^T X)^{-1} x_i,

    the share of a direction that is its own. Keys wider than ``sketch_width`` go through a Gaussian
    matrix of as many columns before: leverage is approximate. Queries of the prompt itself give
    attention that is not causal, among the pairs of a chunk of the sequence, each query's own:

    .. math::
       a_i = \|v_i\| \sum_{j \in \mathrm{chunk}(i)} \mathrm{softmax}_i(
             \mathrm{scale}\langle q_j,k_i\rangle), \qquad
       \mathrm{score}_i = \frac{\tilde a_i - \operatorname{mean} \tilde a}{\operatorname{std}
             \tilde a} + \lambda \frac{o_i - \operatorname{mean} o}{\operatorname{std} o}, \qquad
       w_i = 1

    with :math:`\tilde a` the mean of :math:`a` over a pair and its two neighbors. Pairs at both
    ends are kept unjudged, and left out of all sums.

    ``queries`` are optional here. They must be those of the prompt's own tokens, all of them or
    some that are evenly spread (:func:`coreset_jax.queries.select`, ``"spread"``): sample
    :math:`j` of :math:`q` is taken to stand at position :math:`\lfloor jn/q \rfloor`, padding
    included, and all of a chunk count together as many queries as it has pairs. Without queries
    leverage alone decides, as in an ablation of the paper.

    In the paper leverage is that of keys before their rotary rotation. Here keys come as they are
    cached: with ``rope_base`` the rotation is undone, without it they are taken as they are. Norms
    of values, the mean over neighbors and the ends that are left out of all sums are those of the
    authors' code for kvpress. The paper also shares a budget among heads, as a wrapper may here
    (:mod:`coreset_jax.budgets`), and finds the size that a context can bear, which is not done.

    Args:
      blending: :math:`\lambda`, 0 or more.
      sketch_width: columns of the sketch.
      chunk_size: pairs of a chunk.
      sinks: pairs kept at the front, 0 or more, at most ``size``.
      num_recent: pairs kept at the end, 0 or more.
      rope_base: base of the rotary positions by which keys are rotated, channel :math:`i` with
        channel :math:`i + d/2`, one position a pair; ``None`` if they are not, or not known.
      groups: query heads that share a key-value head, with as many samples each, one after another.
      scale: the softmax scale of the scores alone; the authors' code has 1, and ``None`` means
        ``1/sqrt(d)``. It need not be the model's, and coresets do not carry it.

    A compressor; see :class:`coreset_jax.Compressor`. It is query-free without ``queries``. It
    draws a sketch, for keys that are wider.

    Raises:
      ValueError: on bad options; when called, if keys of odd width are to be rotated.

    References:
      Chari, Van Durme, *Compactor: Calibrated Query-Agnostic KV Cache Compression with Approximate
      Leverage Scores*, 2025, arXiv 2507.08143, Algorithm 1; the authors' code,
      https://github.com/vnchari/compactor-vllm, for how many pairs are kept at the ends.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 64))
    >>> compressor = cj.baselines.compactor(rope_base=1e4)
    >>> coreset = compressor(jax.random.key(1), keys, values, size=128)
    >>> print(coreset.indices[:4])
    [0 1 2 3]
    """

    scale: ArrayLike | None = leaf(default=1.0)
    blending: float = 0.3
    sketch_width: int = 48
    chunk_size: int = 256
    sinks: int = 16
    num_recent: int = 64
    rope_base: float | None = None
    needs_queries = False

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        super().validate()
        self.static_float("blending", positive=False)
        if self.blending < 0:
            raise ValueError(f"blending must be at least 0, got {self.blending:g}.")
        for name in ("sketch_width", "chunk_size"):
            self.static_count(name)
        for name in ("sinks", "num_recent"):
            self.static_count(name, 0)
        object.__setattr__(self, "rope_base", checks.static_float("rope_base", self.rope_base))

    @property
    def query_ball(self) -> QueryBall:
        """None: the scale is that of its own scores, and not of the attention that reads."""
        return QueryBall()

    @property
    def reads_queries(self) -> bool:
        """Whether sample queries change what it returns."""
        return True

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless a call can be answered."""
        if self.rope_base is not None and keys.shape[-1] % 2:
            raise ValueError(f"keys must have an even width to be rotated, got {keys.shape}.")
        super().check_call(keys, size, queries)

    def workspace(self, count: int, size: int, width: int) -> int:
        """Keys less their mean, their sketch, and attention weights of a chunk."""
        del size
        chunk = min(self.chunk_size, count)
        return count * (2 * width + 2 * self.sketch_width) + self.groups * chunk * chunk

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """Leverage, blended with attention where there are queries; infinite at both ends."""
        places = jnp.arange(head.count)
        sinks = min(self.sinks, size)
        recent = min(self.num_recent, size - sinks)
        ends = (places < sinks) | (places >= head.length - recent)
        judged = head.inside & ~ends
        scores = _normalized(self._leverage(head, judged), judged)
        if head.queries is not None and head.queries.shape[0]:
            attention = self._attention(head, judged)
            scores = _normalized(attention, judged) + self.blending * scores
        return jnp.where(ends, jnp.inf, scores)

    def _leverage(self, head: Head, judged: Bool[Array, " n"]) -> Float[Array, " n"]:
        """The leverage of keys among those that are judged ``[n]``."""
        keys = head.keys.astype(head.dtype)
        if self.rope_base is not None:
            # All of them moved to position 0.
            places = jnp.arange(head.count, dtype=jnp.int32)
            frequencies = rotary_frequencies(keys.shape[-1], self.rope_base)
            keys = ahead(keys, places, 0, frequencies, horizon=1)
        count = jnp.maximum(jnp.sum(judged, dtype=head.dtype), 1)
        mean = jnp.sum(jnp.where(judged[:, None], keys, 0), axis=0) / count
        keys = jnp.where(judged[:, None], keys - mean[None], 0)
        if keys.shape[-1] > self.sketch_width:
            shape = keys.shape[-1], self.sketch_width
            sketch = jax.random.normal(head.key, shape, head.dtype) / math.sqrt(self.sketch_width)
            keys = matmul(keys, sketch)
        gram = matmul(keys.T, keys)
        inverse = regularized_inverse(gram + _REGULARIZER * identity_like(gram), _RIDGE)
        return jnp.sum(matmul(keys, inverse) * keys, axis=-1)

    def _attention(self, head: Head, judged: Bool[Array, " n"]) -> Float[Array, " n"]:
        """Pooled attention among the pairs of a chunk, times the norm of the value ``[n]``."""
        count, size = head.count, min(self.chunk_size, head.count)
        samples = self.grouped(head).astype(head.dtype)
        chunks = -(-count // size)
        # Which samples stand in which chunk is known: as many rows for each, some left out.
        positions = np.arange(samples.shape[1]) * count // samples.shape[1]
        first = np.searchsorted(positions, np.arange(chunks + 1) * size)
        rows = first[:-1, None] + np.arange(max(np.diff(first)))
        present = rows < first[1:, None]
        rows = np.minimum(rows, samples.shape[1] - 1)
        counted = jnp.asarray(present) & judged[positions[rows]]
        spare = chunks * size - count
        keys = jnp.pad(head.keys.astype(head.dtype), ((0, spare), (0, 0)))
        pairs = jnp.pad(judged, (0, spare)).reshape(chunks, size)
        scale = head.scale if self.scale is None else jnp.asarray(self.scale, head.dtype)

        def in_chunk(chunk: tuple[Array, Array, Array, Array]) -> Array:
            queries, counted, keys, pairs = chunk
            logits = scale * inner_products(queries.reshape(-1, queries.shape[-1]), keys)
            weights = jax.nn.softmax(
                jnp.where(pairs[None], logits, jnp.finfo(logits.dtype).min), axis=-1
            )
            counted = jnp.tile(counted, self.groups)
            total = jnp.sum(jnp.where(counted[:, None], weights, 0), axis=0)
            # As if there were a query for each pair; without any, pairs are alike.
            several = jnp.maximum(jnp.sum(counted, dtype=head.dtype), 1)
            share = jnp.sum(pairs, dtype=head.dtype) / several
            return jnp.where(jnp.any(counted), share * total, 1)

        queries = jnp.moveaxis(samples[:, rows], 0, 1)
        found = jax.lax.map(in_chunk, (queries, counted, keys.reshape(chunks, size, -1), pairs))
        norms = jnp.linalg.norm(head.values.astype(head.dtype), axis=-1)
        found = jnp.where(judged, found.reshape(-1)[:count] * norms, 0)
        wide = jnp.pad(found, _POOL // 2)
        pooled = sum(wide[start : start + count] for start in range(_POOL))
        return jnp.asarray(pooled) / _POOL


def _mean(scores: Float[Array, " n"], judged: Bool[Array, " n"]) -> Float[Array, ""]:
    """The mean of those that are judged, and 0 where there is none."""
    count = jnp.maximum(jnp.sum(judged, dtype=scores.dtype), 1)
    return jnp.sum(jnp.where(judged, scores, 0)) / count


def _normalized(scores: Float[Array, " n"], judged: Bool[Array, " n"]) -> Float[Array, " n"]:
    """Scores less their mean, in units of their standard deviation."""
    centered = scores - _mean(scores, judged)
    variance = _mean(jnp.square(centered), judged)
    return centered / jnp.sqrt(jnp.maximum(variance, jnp.finfo(scores.dtype).tiny))
