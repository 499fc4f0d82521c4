r"""Attention matching: weights and values fitted to what sample queries read from the cache.

Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284. What is
called "as published" here is the authors' code: its highest-attention keys and its fast settings.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax import validation
from coreset_jax.attention import accumulation_dtype, default_scale
from coreset_jax.coreset import Compressor, Coreset, gather, over_heads, whole_cache
from coreset_jax.refit.samples import matched_log_weights, matched_values

HIGHEST = jax.lax.Precision.HIGHEST

# Queries whose scores over the whole cache are held at a time.
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of :func:`attention_matching`, hashable to be static under ``jax.jit``."""

    ridge: float = 1e-5
    bound: float = 3.0
    steps: int = 2
    scale: float | None = None


class _Answers(NamedTuple):
    """What the sample queries read from the whole cache.

    Attributes:
      importance: sum over the queries of each pair's squared attention ``[n]``.
      maxima: largest score of each query ``[q]``.
      totals: sum of the exponentials of the scores less the largest ``[q]``.
      outputs: exact attention ``[q, dv]``.
    """

    importance: Float[Array, " n"]
    maxima: Float[Array, " q"]
    totals: Float[Array, " q"]
    outputs: Float[Array, "q dv"]


def _ask(
    queries: Float[Array, "q d"],
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    inside: Bool[Array, " n"],
) -> _Answers:
    """Reads the cache, a block of queries at a time. The queries have absorbed the scale."""
    count = queries.shape[0]
    width = min(_BLOCK, count)
    blocks = -(-count // width)
    padded = jnp.pad(queries, ((0, blocks * width - count), (0, 0)))
    real = (jnp.arange(blocks * width) < count).reshape(blocks, width)

    def ask_block(
        importance: Array, block: tuple[Array, Array]
    ) -> tuple[Array, tuple[Array, Array, Array]]:
        queries, real = block
        scores = jnp.matmul(queries, keys.T, precision=HIGHEST)
        scores = jnp.where(inside[None], scores, -jnp.inf)
        maxima = jnp.max(scores, axis=-1)
        masses = jnp.exp(scores - maxima[:, None])
        totals = jnp.sum(masses, axis=-1)
        shares = masses / totals[:, None]
        squares = jnp.where(real[:, None], jnp.square(shares), 0)
        outputs = jnp.matmul(shares, values, precision=HIGHEST)
        return importance + jnp.sum(squares, axis=0), (maxima, totals, outputs)

    importance, rows = jax.lax.scan(
        ask_block,
        jnp.zeros_like(keys[:, 0]) + jnp.zeros_like(queries[0, 0]),
        (padded.reshape(blocks, width, -1), real),
    )
    maxima, totals, outputs = (
        each.reshape(blocks * width, *each.shape[2:])[:count] for each in rows
    )
    return _Answers(importance, maxima, totals, outputs)


def _compress_head(
    rng: Array,
    keys: Float[Array, "n d"],
    values: Float[Array, "n dv"],
    length: Int[Array, ""],
    queries: Float[Array, "q d"],
    *,
    size: int,
    options: Options,
) -> Coreset:
    del rng
    count = keys.shape[0]
    dtype = accumulation_dtype(keys, values)
    scale = default_scale(keys.shape[-1]) if options.scale is None else options.scale
    scaled = scale * queries.astype(dtype)
    inside = jnp.arange(count) < length
    # Padding may hold anything.
    all_keys = jnp.where(inside[:, None], keys.astype(dtype), 0)
    all_values = jnp.where(inside[:, None], values.astype(dtype), 0)
    answers = _ask(scaled, all_keys, all_values, inside)

    _, kept = jax.lax.top_k(jnp.where(inside, answers.importance, -1), size)
    kept = jnp.sort(jnp.where(kept < length, kept, count))
    coreset = gather(keys, values, jnp.where(kept < count, kept, -1), jnp.zeros((size,), dtype))
    scores = jnp.matmul(scaled, coreset.keys.astype(dtype).T, precision=HIGHEST)
    masses = jnp.exp(scores - answers.maxima[:, None])
    log_weights = matched_log_weights(
        masses, answers.totals, bound=options.bound, steps=options.steps
    )
    shares = jax.nn.softmax(scores + log_weights[None], axis=-1)
    fitted = matched_values(shares, answers.outputs, ridge=options.ridge)
    # A head no longer than this is kept whole.
    whole = length <= size
    finite = jnp.all(jnp.isfinite(queries))
    log_weights = jnp.where(whole, coreset.log_weights, log_weights)
    return coreset._replace(
        values=jnp.where(whole, coreset.values, fitted.astype(values.dtype)),
        log_weights=jnp.where(finite, log_weights, jnp.nan),
    )


@functools.partial(jax.jit, static_argnames=("size", "options"))
def _compress(
    rng: Array,
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    lengths: Int[Array, "*heads"] | None,
    queries: Float[Array, "*heads q d"],
    *,
    size: int,
    options: Options,
) -> Coreset:
    compress_head = functools.partial(_compress_head, size=size, options=options)
    return over_heads(compress_head, rng, keys, values, lengths, queries)


@dataclasses.dataclass(frozen=True)
class _AttentionMatching:
    options: Options

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Int[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
    ) -> Coreset:
        validation.check_cache(keys, values)
        validation.check_size(size)
        validation.check_lengths(lengths, keys)
        if queries is None:
            raise ValueError("queries must be given: attention is matched on sample queries.")
        validation.check_queries(queries, keys)
        if queries.shape[-2] < 1:
            raise ValueError(
                f"queries must not be empty; got queries {queries.shape} and keys {keys.shape}."
            )
        if size >= keys.shape[-2]:
            return whole_cache(keys, values, lengths)
        return _compress(rng, keys, values, lengths, queries, size=int(size), options=self.options)


def attention_matching(
    ridge: float = 1e-5, bound: float = 3.0, steps: int = 2, scale: float | None = None
) -> Compressor:
    r"""Attention matching on the highest-attention keys, in the authors' fast settings.

    With scores :math:`s_{qi} = \mathrm{scale}\langle q, k_i\rangle` of the sample queries,
    :math:`E_{qi} = e^{s_{qi} - \max_j s_{qj}}` and their exact outputs :math:`Y`, it keeps the
    :math:`m` keys of largest root mean square attention over the samples, weighs them so that they
    have the mass of all, and fits values to the outputs:

    .. math::
       B = \mathrm{clip}\bigl(\arg\min_B \|E_S B - E 1\|,\; e^{-\mathrm{bound}},
           e^{\mathrm{bound}}\bigr) \text{ and a few steps } B \leftarrow
           \mathrm{clip}\Bigl(B - \tfrac{1}{\sigma_{\max}^2} E_S^T(E_S B - E 1)\Bigr), \qquad
       \beta = \log B,

    .. math::
       X_{qi} = \mathrm{softmax}_{i \in S}(s_{qi} + \beta_i), \qquad
       C = \bigl(X^T X + \mathrm{ridge}\; \sigma_{\max}(X)^2 I\bigr)^{-1} X^T Y .

    The coreset has log-weights :math:`\beta` and values :math:`C`.

    It differs from the authors' code where that is arbitrary. They solve for :math:`B` with a
    solver that assumes full rank, whose answer is rounding where keys repeat; here a ridge of a
    thousand roundings gives copies equal shares. They start their power iteration at random; here
    it starts from ones, and nothing is drawn: ``rng`` is not used.

    The fit knows nothing of queries unlike the samples. With no more samples than pairs kept it
    interpolates, and the ridge is all that holds it. In float32 without ridge, copies would
    make values of :math:`10^8`; at the default it is as good as in float64.

    Args:
      ridge: regularisation of the values, relative to the largest eigenvalue.
      bound: largest absolute log-weight.
      steps: gradient steps after the clip.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries [..., q, d]) -> Coreset``. It wants sample queries. Keys and
      values are float arrays of any width; keys are bit-identical to the source, values are
      not, and weights need not sum to the length. Sums, factors and log-weights are float32 or
      wider. ``size >= n`` returns the cache itself; a head with a NaN or an infinity among its
      queries gets NaN log-weights. Time is that of ``q * n`` scores and :math:`O((q + m) m^2)`;
      memory beside the cache is a float32 copy of it, ``128 * n + q * m`` numbers and a few
      ``m x m`` matrices a head.
      On a mesh of Explicit axes call it inside ``jax.shard_map``. The call raises ``ValueError``
      if ``queries`` are not given or empty, if shapes do not fit, if ``size`` is not a positive
      integer or if ``lengths`` lie outside ``1..n``.

    Raises:
      ValueError: if an option is not a static positive number, or ``steps`` no count.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284,
      and the authors' code, https://github.com/adamzweiger/compaction.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 4, 128, 16))
    >>> compressor = cj.baselines.attention_matching()
    >>> coreset = compressor(jax.random.key(1), keys, values, size=48, queries=queries)
    >>> coreset.keys.shape, coreset.log_weights.shape
    ((4, 48, 16), (4, 48))
    """
    validation.check_count("steps", steps, 0)
    return _AttentionMatching(
        Options(
            ridge=validation.static_float("ridge", ridge),
            bound=validation.static_float("bound", bound),
            steps=int(steps),
            scale=validation.static_float("scale", scale),
        )
    )
