r"""Where sample queries come from, and what is learned from them.

A coreset for queries that are known to come is far better than one for all queries of a ball. They
are not known, but others like them are:

- ``last``: the last queries of the prompt, as in SnapKV. They stand where the next will, but ask
  little of what the prompt holds.
- ``spread``: all queries of the prompt, thinned out. They ask for all of it, but from where they
  stand: a later token does not look back at the newest ones as they do.
- ``ahead``: the same, moved to where the next tokens will stand (:func:`ahead`). Rotary positions
  make that an exact rotation. It needs no further pass of the model, and measures best.
- ``reconstruction``: the model reads its context once more behind the full cache, as if it were to
  repeat it, and the queries of that pass are taken (KVzip). It costs about two prefills.

:func:`select` takes some of a prompt's queries, moved or not. Where a prompt is read in chunks, or
read again, :func:`observe` keeps a running score of every pair and a thinned-out sample, so that
memory does not grow with the number of queries::

    observed = cj.queries.empty(keys, count=1024)
    for chunk in chunks:  # queries [..., q, d], those of a group one after another
        observed = cj.queries.observe(observed, chunk, keys)
    coreset = compressor(
        rng, keys, values, size=size, queries=observed.queries, scores=observed.scores
    )
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Integer

from coreset_jax._src import checks
from coreset_jax._src.core.compressor import QueryBall
from coreset_jax._src.core.driver import Cache, for_each_head
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.turns import in_turns
from coreset_jax._src.geometry.rotary import turned
from coreset_jax._src.precision import accumulation_dtype
from coreset_jax._src.queries.scores import WEIGHTS, largest_attention

Source = Literal["last", "spread"]
"""Which of some queries are taken; see :func:`select`."""

# Positions behind the prompt over which queries are spread. They hardly matter: between 64 and
# 1024, the divergence of a pretrained model over compressed caches changed by a third.
_HORIZON = 256

# Knuth's multiplicative hash: multiples of the golden ratio modulo one are evenly spread, however
# many there are.
_GOLDEN = 2654435769


class Observed(NamedTuple):
    """What is known of queries that came in chunks, of fixed size.

    Attributes:
      queries: a sample of all queries that came, evenly spread over them ``[..., s, d]``. As long
        as fewer than ``s`` have come, some are repeated, and before the first all are zero.
      scores: the largest attention weight that any of them gave each pair ``[..., n]``.
      places: which queries, in the order in which they came, are in the sample, ``[s]``, int32.
      seen: queries that have come, int32.
    """

    queries: Float[Array, "*heads s d"]
    scores: Float[Array, "*heads n"]
    places: Int[Array, " s"]
    seen: Int[Array, ""]


def rotary_frequencies(width: int, base: float) -> Float[Array, " half"]:
    r"""The angles :math:`\mathrm{base}^{-2i/d}` by which channels turn from a position to the next.

    Args:
      width: :math:`d`, even.
      base: base of the geometric progression.

    Raises:
      ValueError: if ``width`` is odd or below 2, or ``base`` is not positive.

    References:
      Su et al., *RoFormer: Enhanced transformer with rotary position embedding*, 2021.

    >>> print(rotary_frequencies(4, 1e4))
    [1.   0.01]
    """
    checks.check_count("width", width, 2)
    checks.check_positive("base", base)
    if width % 2:
        raise ValueError(f"width must be even, got {width}.")
    return base ** (-jnp.arange(width // 2, dtype=jnp.float32) / (width // 2))


def ahead(
    queries: Float[Array, "*heads q d"],
    positions: Integer[Array, "*#heads q"],
    start: ArrayLike,
    frequencies: Float[Array, " half"],
    *,
    horizon: int = _HORIZON,
) -> Float[Array, "*heads q d"]:
    r"""Queries of a prompt as they would be if their tokens stood behind it.

    .. math:: q'_j = R_{p'_j - p_j}\, q_j, \qquad
              p'_j = \mathrm{start} + (p_j \bmod \mathrm{horizon})

    with :math:`R_a` the rotation of rotary positions by :math:`a`. What a token asks for is in its
    query before the rotation; where it asks from is the rotation. A token early in a prompt asks,
    from there, for what is near it; moved ahead, for the same out of the whole prompt, as a token
    does that will come.

    Args:
      queries: queries behind their rotary rotation ``[..., q, d]``. Channel :math:`i` is turned
        with channel :math:`i + h`, as in Llama and Qwen, for ``h`` frequencies; channels from
        :math:`2 h` on are not turned.
      positions: where their tokens stand ``[q]`` or ``[..., q]``.
      start: the first position behind the prompt.
      frequencies: angles that the channels turn by from a position to the next ``[h]``, with
        :math:`2h \le d`; see :func:`rotary_frequencies`.
      horizon: how many positions behind the prompt queries are spread over, static.

    Returns:
      The moved queries ``[..., q, d]``, in their dtype.

    Raises:
      ValueError: if shapes do not fit or ``horizon`` is below 1.

    >>> import coreset_jax as cj
    >>> frequencies = cj.queries.rotary_frequencies(2, 1e4)
    >>> query = jnp.array([[1.0, 0.0]])  # at position 0: the angle is 0
    >>> print(cj.queries.ahead(query, jnp.array([0]), 1, frequencies).round(4))  # and here 1
    [[0.5403 0.8415]]
    """
    checks.check_floating("queries", queries)
    checks.check_count("horizon", horizon)
    half = frequencies.shape[-1]
    if queries.ndim < 2 or frequencies.ndim != 1 or 2 * half > queries.shape[-1]:
        raise ValueError(
            "queries must be [..., q, d] and frequencies [h] with 2 h at most d; got queries "
            f"{queries.shape} and frequencies {frequencies.shape}."
        )
    if positions.shape[-1:] != queries.shape[-2:-1] or positions.ndim >= queries.ndim:
        raise ValueError(
            "positions must be [q] or [..., q], one for each query; got positions "
            f"{positions.shape} and queries {queries.shape}."
        )
    dtype = accumulation_dtype(queries)
    distances = jnp.broadcast_to(start + positions % horizon - positions, queries.shape[:-1])
    turns = jnp.broadcast_to(frequencies.astype(dtype), (*queries.shape[:-1], half))
    angles = distances[..., None].astype(dtype) * turns
    return turned(queries, angles)


def select(
    queries: Float[Array, "*heads q d"], count: int, source: Source = "spread"
) -> Float[Array, "*heads s d"]:
    """Some of a prompt's queries.

    Args:
      queries: all of them, in the order of their tokens ``[..., q, d]``.
      count: how many are wanted, static.
      source: ``"last"`` for the last ones, ``"spread"`` for some that are evenly spread.

    Returns:
      ``min(count, q)`` queries ``[..., s, d]``.

    Raises:
      ValueError: if ``count`` is below 1 or the source unknown.

    >>> queries = jnp.arange(8.0)[:, None]
    >>> print(select(queries, 4)[:, 0], select(queries, 2, "last")[:, 0])
    [0. 2. 4. 6.] [6. 7.]
    """
    checks.check_floating("queries", queries)
    checks.check_count("count", count)
    if source not in ("last", "spread"):
        raise ValueError(f"source must be 'last' or 'spread', got {source!r}.")
    whole = queries.shape[-2]
    if count >= whole:
        return queries
    if source == "last":
        return queries[..., whole - count :, :]
    return queries[..., jnp.arange(count) * whole // count, :]


def empty(keys: Float[Array, "*heads n d"], *, count: int = 1024) -> Observed:
    """What is known of queries before the first one.

    Args:
      keys: the cached keys that they will read ``[..., n, d]``.
      count: queries of the sample, static.

    Raises:
      ValueError: if keys have no such shape or ``count`` is below 1.
    """
    checks.check_cache(keys, keys)
    checks.check_count("count", count)
    # Made from the keys, so that they are sharded alike.
    scores = jnp.zeros_like(keys[..., 0], accumulation_dtype(keys))
    samples = jnp.zeros_like(keys[..., :1, :]) * jnp.zeros((count, 1), keys.dtype)
    return Observed(samples, scores, jnp.full(count, -1, jnp.int32), jnp.zeros((), jnp.int32))


def observe(
    observed: Observed,
    queries: Float[Array, "*heads q d"],
    keys: Float[Array, "*heads n d"],
    *,
    lengths: Integer[Array, "*heads"] | None = None,
    scale: ArrayLike | None = None,
    log_others: Float[Array, "*heads q"] | None = None,
) -> Observed:
    r"""What is known of queries after some more of them.

    .. math:: s_i \leftarrow \max\Bigl(s_i,\; \max_j
              \frac{e^{\mathrm{scale}\langle q_j, k_i\rangle}}
              {\sum_l e^{\mathrm{scale}\langle q_j, k_l\rangle} + e^{o_j}}\Bigr)

    Every query sees all valid pairs. The sample and the scores do not depend on how queries are cut
    into chunks.

    Args:
      observed: what was known before; see :func:`empty`.
      queries: the next ones ``[..., q, d]``.
      keys: the cached keys ``[..., n, d]``, the same in every call.
      lengths: valid pairs of each head ``[...]``; the rest is padding and may hold anything.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``.
      log_others: :math:`o_j`, the log-sum-exp of the scores of whatever else each query attends to,
        as the text of a reconstruction itself, ``[..., q]``; ``None`` for nothing.

    Raises:
      ValueError: if shapes do not fit.

    References:
      Kim, Kim, Kwon, Lee, Yun, Song, *KVzip: Query-Agnostic KV Cache Compression with Context
      Reconstruction*, 2025, arXiv 2505.23416, Section 3, for the score.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 128, 16))
    >>> observed = cj.queries.observe(cj.queries.empty(keys, count=32), queries, keys)
    >>> observed.scores.shape, observed.queries.shape
    ((128,), (32, 16))
    """
    checks.check_cache(keys, keys)
    checks.check_queries(queries, keys)
    checks.check_lengths(lengths, keys)
    checks.check_positive("scale", scale, keys.shape[:-2])
    checks.check_scores(observed.scores, keys)
    if log_others is not None and log_others.shape != queries.shape[:-1]:
        raise ValueError(
            "log_others must be [..., q], one for each query; got log_others "
            f"{log_others.shape} and queries {queries.shape}."
        )
    return _observe(observed, queries, keys, lengths, scale, log_others)


@jax.jit
def _observe(
    observed: Observed,
    queries: Float[Array, "*heads q d"],
    keys: Float[Array, "*heads n d"],
    lengths: Integer[Array, "*heads"] | None,
    scale: ArrayLike | None,
    log_others: Float[Array, "*heads q"] | None,
) -> Observed:
    cache = Cache(jax.random.key(0), keys, keys, lengths, queries, None, measured=False)
    # Nothing here asks for a radius.
    ball = QueryBall(query_norm=1.0, scale=scale)
    workspace = min(queries.shape[-2] * keys.shape[-2], WEIGHTS)

    def score(head: Head, log_others: Array | None) -> Array:
        assert head.queries is not None
        return largest_attention(head, head.queries, log_others)

    scores = for_each_head(in_turns(score, workspace), cache, ball, log_others)
    count, more = observed.queries.shape[-2], queries.shape[-2]
    places = jnp.concatenate([observed.places, observed.seen + jnp.arange(more, dtype=jnp.int32)])
    # Those of the smallest hash are kept.
    hashes = places.astype(jnp.uint32) * jnp.uint32(_GOLDEN)
    ranks = jnp.where(places < 0, jnp.uint32(0xFFFFFFFF), hashes)
    order = jnp.argsort(ranks)[:count]
    order = order[
        jnp.argsort(jnp.where(places[order] < 0, jnp.iinfo(jnp.int32).max, places[order]))
    ]
    # As long as they are fewer than the sample, they are gone through again.
    filled = jnp.maximum(jnp.sum(places[order] >= 0), 1)
    kept = order[jnp.arange(count) % filled]
    scores = scores.astype(observed.scores.dtype)
    largest = jnp.maximum(observed.scores, scores)
    # Maxima may forget what is not a number.
    largest = jnp.where(jnp.isnan(observed.scores + scores), jnp.nan, largest)
    both = jnp.concatenate([observed.queries, queries.astype(observed.queries.dtype)], axis=-2)
    return Observed(
        jnp.take(both, kept, axis=-2),
        largest,
        jnp.where(jnp.arange(count) < filled, places[order], -1),
        observed.seen + more,
    )
