"""Softmax attention over key-value pairs that carry log-weights, and partial states that merge.

Everything here is exact: it is what a coreset is compared with, and what reads a coreset.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Integer

from coreset_jax._src import checks, meshes
from coreset_jax._src.precision import accumulation_dtype, log


class PartialAttention(NamedTuple):
    r"""Attention over a part of the pairs, in a form that merges exactly with other parts.

    With scores :math:`s_i`, ``maximum`` is :math:`M = \max_i s_i`, ``total`` is
    :math:`\sum_i e^{s_i - M}` and ``output`` is :math:`\sum_i e^{s_i - M} v_i`.
    A part without pairs has ``maximum`` :math:`-\infty` and zeros.
    """

    maximum: Float[Array, "*heads q"]
    total: Float[Array, "*heads q"]
    output: Float[Array, "*heads q dv"]


def default_scale(width: int) -> float:
    r"""The softmax scale :math:`1/\sqrt d` of ``jax.nn.dot_product_attention``."""
    return width**-0.5


def capped(scores: Float[Array, "..."], soft_cap: ArrayLike | None) -> Float[Array, "..."]:
    r"""Scores :math:`c \tanh(s/c)`, which stay below the cap, as in Gemma 2; ``None`` for none."""
    if soft_cap is None:
        return scores
    return jnp.multiply(soft_cap, jnp.tanh(jnp.divide(scores, soft_cap)))


def partial_attention(
    queries: Float[Array, "*heads q d"],
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    log_weights: Float[Array, "*#heads n"] | None = None,
    *,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    visible: Bool[Array, "#q n"] | None = None,
) -> PartialAttention:
    r"""Attention over these pairs alone, ready to be merged with other pairs.

    .. math:: s_i = \mathrm{cap}(\mathrm{scale}\,\langle q, k_i\rangle) + \log w_i

    Args:
      queries: queries ``[..., q, d]``.
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      log_weights: natural logarithms of the pairs' weights ``[..., n]``; ``-inf`` leaves a
        pair out. ``None`` weighs every pair 1.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``.
      soft_cap: the cap of scores, see :func:`capped`.
      visible: which pairs each query may see ``[q, n]``; ``None`` means all.

    Returns:
      The partial state, in float32 or wider.
    """
    dtype = accumulation_dtype(queries, keys, values)
    scale = default_scale(keys.shape[-1]) if scale is None else scale
    if jnp.ndim(scale):
        scale = jnp.asarray(scale, dtype)[..., None, None]
    products = jnp.einsum(
        "...qd,...nd->...qn",
        queries,
        keys,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    # Before the weights: w copies of a pair have the score of one.
    scores = capped(jnp.multiply(scale, products), soft_cap)
    if log_weights is not None:
        scores = scores + log_weights[..., None, :].astype(dtype)
    if visible is not None:
        scores = jnp.where(visible, scores, -jnp.inf)
    maximum = jnp.max(scores, axis=-1)
    # A part whose pairs all have weight zero must give zeros, not the NaN of (-inf) - (-inf).
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    masses = jnp.exp(scores - jax.lax.stop_gradient(shift)[..., None])
    output = jnp.einsum(
        "...qn,...nv->...qv",
        masses,
        values,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=dtype,
    )
    return PartialAttention(jax.lax.stop_gradient(maximum), jnp.sum(masses, axis=-1), output)


def sink_state(sink_logits: Float[Array, "*#heads #q"], like: PartialAttention) -> PartialAttention:
    """The partial state of a pair of score ``sink_logits`` and value zero for each query.

    Args:
      sink_logits: the scores, to be broadcast to ``[..., q]``; ``-inf`` is no pair.
      like: a state that this is to be merged with.
    """
    logits = jnp.broadcast_to(sink_logits.astype(like.total.dtype), like.total.shape)
    maximum = jax.lax.stop_gradient(logits)
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    return PartialAttention(maximum, jnp.exp(logits - shift), jnp.zeros_like(like.output))


def merge(left: PartialAttention, right: PartialAttention) -> PartialAttention:
    """The partial state of two disjoint sets of pairs; associative and commutative.

    Args:
      left: the state of one set.
      right: the state of the other, of the same shapes.

    Returns:
      The state of the union.
    """
    maximum = jnp.maximum(left.maximum, right.maximum)
    shift = jnp.where(jnp.isneginf(maximum), jnp.zeros_like(maximum), maximum)
    left_factor = jnp.exp(left.maximum - shift)
    right_factor = jnp.exp(right.maximum - shift)
    return PartialAttention(
        maximum,
        left.total * left_factor + right.total * right_factor,
        left.output * left_factor[..., None] + right.output * right_factor[..., None],
    )


def finish(state: PartialAttention) -> Float[Array, "*heads q dv"]:
    """The attention output of a partial state; zero where it holds no pair at all."""
    empty = state.total == 0
    total = jnp.where(empty, jnp.ones_like(state.total), state.total)
    return state.output / total[..., None]


def log_sum_exp(state: PartialAttention) -> Float[Array, "*heads q"]:
    """The logarithm of the denominator of a partial state; ``-inf`` where it holds no pair."""
    return state.maximum + log(state.total)


def merge_attention(
    parts: Sequence[tuple[Float[Array, "*rows dv"], Float[Array, "*rows"]]],
) -> tuple[Float[Array, "*rows dv"], Float[Array, "*rows"]]:
    r"""Attention over all pairs, from attention over disjoint parts of them.

    .. math::
       o = \frac{\sum_p e^{\ell_p} o_p}{\sum_p e^{\ell_p}}, \qquad
       \ell = \log \sum_p e^{\ell_p}

    It is exact but for rounding, whoever computed the parts: a coreset and the tokens behind it,
    shards of a sequence on several devices, a kernel of another library. Parts may be merged in any
    order, and what comes out merged with further ones.

    Args:
      parts: one part or more, each the outputs ``[..., dv]`` and the log-sum-exp ``[...]`` of the
        same queries, as of ``cj.attend(..., return_lse=True)``. Where a log-sum-exp is ``-inf`` a
        part holds no pair, and its outputs may be anything.

    Returns:
      Outputs in the dtype of the first part's, zero where no part holds a pair, and the log-sum-exp
      in float32 or wider. A log-sum-exp of hundreds carries its own rounding, of which outputs have
      a part too: 1e-5 at 200 in float32.

    Raises:
      ValueError: if there are no parts, or their shapes do not fit each other.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 512, 16))
    >>> coreset = cj.compress(jax.random.key(1), keys, values, size=64)
    >>> new_keys, new_values = jax.random.normal(jax.random.key(2), (2, 10, 16))
    >>> outputs, lse = cj.merge_attention([
    ...     cj.attend(queries, coreset, return_lse=True),
    ...     cj.attention(queries, new_keys, new_values, return_lse=True),
    ... ])
    >>> outputs.shape, lse.shape
    ((512, 16), (512,))
    """
    parts = [(outputs, lse) for outputs, lse in parts]
    if not parts:
        raise ValueError("parts must not be empty.")
    for outputs, lse in parts:
        if outputs.shape != parts[0][0].shape or lse.shape != outputs.shape[:-1]:
            raise ValueError(
                "parts must be outputs [..., dv] and log-sum-exps [...] of the same queries; got "
                f"{[(outputs.shape, lse.shape) for outputs, lse in parts]}."
            )
    dtype = accumulation_dtype(*(each for part in parts for each in part))
    lses = jnp.stack([lse.astype(dtype) for _, lse in parts])
    empty = jnp.isneginf(lses)
    highest = jnp.max(lses, axis=0)
    shift = jax.lax.stop_gradient(jnp.where(jnp.isneginf(highest), 0, highest))
    shares = jnp.where(empty, 0, jnp.exp(jnp.where(empty, 0, lses - shift[None])))
    outputs = jnp.stack([outputs.astype(dtype) for outputs, _ in parts])
    outputs = jnp.where(empty[..., None], 0, outputs)
    total = jnp.sum(shares, axis=0)
    merged = PartialAttention(shift, total, jnp.sum(shares[..., None] * outputs, axis=0))
    return results(merged, parts[0][0].dtype, return_lse=True)


def length_log_weights(
    lengths: Integer[Array, "*heads"], count: int, dtype: jnp.dtype
) -> Float[Array, "*heads n"]:
    """Log-weights that are 0 for the first ``lengths`` of ``count`` pairs and ``-inf`` after."""
    inside = jnp.arange(count) < jnp.asarray(lengths)[..., None]
    return jnp.where(inside, jnp.zeros((), dtype), jnp.full((), -jnp.inf, dtype))


def attention(
    queries: Float[Array, "*heads q d"],
    keys: Float[Array, "*heads n d"],
    values: Float[Array, "*heads n dv"],
    log_weights: Float[Array, "*#heads n"] | None = None,
    *,
    lengths: Integer[Array, "*heads"] | None = None,
    scale: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    sink_logits: Float[Array, "..."] | None = None,
    block_size: int | None = None,
    return_lse: bool = False,
) -> Any:
    r"""Softmax attention over weighted pairs.

    .. math::
       \mathrm{Attn}(q) = \frac{\sum_i w_i e^{s_i} v_i}{e^b + \sum_i w_i e^{s_i}}, \qquad
       s_i = c \tanh\left(\tfrac{1}{c}\, \mathrm{scale}\langle q,k_i\rangle\right)

    without a cap :math:`c` the scores :math:`\mathrm{scale}\langle q,k_i\rangle` themselves, and
    without a sink logit :math:`b` no such term. Weights multiply what is capped.

    Args:
      queries: queries ``[..., q, d]``.
      keys: keys ``[..., n, d]``.
      values: values ``[..., n, dv]``.
      log_weights: natural logarithms of the weights ``[..., n]``; ``None`` means all 0.
      lengths: number of valid pairs of each head ``[...]``; ``None`` means ``n``.
      scale: the softmax scale, a scalar or ``[...]``; ``None`` means ``1/sqrt(d)``.
      soft_cap: a bound that scores approach, as in Gemma 2; ``None`` for none.
      sink_logits: learned logits of the denominator, as in gpt-oss: one a head ``[...]``, or one a
        query ``[..., q]``, where queries of several heads lie behind each other; ``None`` for none.
      block_size: pairs per step; scores are then held for one block at a time
        (``q * block_size`` instead of ``q * n`` numbers). ``None`` takes all at once.
      return_lse: whether to return the logarithm of the denominator too, for
        :func:`coreset_jax.merge_attention`.

    Returns:
      Outputs ``[..., q, dv]`` in the dtype of ``values``, zero where there is no pair; and with
      ``return_lse`` the pair of these and the log-sum-exp ``[..., q]`` in float32 or wider,
      ``-inf`` where there is none.

    Raises:
      ValueError: if ranks, leading axes, widths or lengths do not fit, or ``soft_cap`` is not
        positive.

    References:
      Gemma Team, *Gemma 2: Improving open language models at a practical size*, 2024, arXiv
      2408.00118, for the cap. OpenAI, *gpt-oss-120b & gpt-oss-20b model card*, 2025, arXiv
      2508.10925, for sink logits.

    >>> import jax.numpy as jnp
    >>> keys, values = jnp.zeros((4, 2)), jnp.arange(8.0).reshape(4, 2)
    >>> attention(jnp.ones((1, 2)), keys, values)
    Array([[3., 4.]], dtype=float32)
    """
    checks.check_cache(keys, values)
    checks.check_queries(queries, keys)
    checks.check_lengths(lengths, keys)
    checks.check_positive("scale", scale, keys.shape[:-2])
    checks.check_positive("soft_cap", soft_cap)
    checks.check_sink_logits(sink_logits, queries)
    if block_size is not None:
        checks.check_count("block_size", block_size)
    if log_weights is not None and log_weights.shape != keys.shape[:-1]:
        raise ValueError(
            f"log_weights must have shape {keys.shape[:-1]}, one for each pair; "
            f"got log_weights {log_weights.shape} and keys {keys.shape}."
        )
    count = keys.shape[-2]
    dtype = accumulation_dtype(queries, keys, values)
    queries, keys, values, log_weights, lengths = meshes.alike(
        keys.ndim - 2, queries, keys, values, log_weights, lengths
    )
    if lengths is not None:
        mask = length_log_weights(lengths, count, dtype)
        # Padding may hold anything, and 0 * NaN is NaN: it must leave the sums altogether.
        inside = (mask == 0)[..., None]
        keys = jnp.where(inside, keys, jnp.zeros_like(keys))
        values = jnp.where(inside, values, jnp.zeros_like(values))
        log_weights = mask if log_weights is None else jnp.where(inside[..., 0], log_weights, mask)
    options: dict[str, Any] = {"scale": scale, "soft_cap": soft_cap}
    if block_size is None or block_size >= count:
        state = partial_attention(queries, keys, values, log_weights, **options)
    else:
        state = _in_blocks(queries, keys, values, log_weights, block_size, options)
    return results(with_sinks(state, sink_logits), values.dtype, return_lse)


def results(state: PartialAttention, dtype: jnp.dtype, return_lse: bool) -> Any:
    """Outputs of a state in a dtype, or these and the log-sum-exp."""
    outputs = finish(state).astype(dtype)
    return (outputs, log_sum_exp(state)) if return_lse else outputs


def _in_blocks(
    queries: Array,
    keys: Array,
    values: Array,
    log_weights: Array | None,
    block_size: int,
    options: dict[str, Any],
) -> PartialAttention:
    """Attention over all pairs, the scores of a block of them at a time."""
    count = keys.shape[-2]
    if log_weights is None:
        log_weights = jnp.zeros_like(keys[..., 0], accumulation_dtype(queries, keys, values))
    whole = count // block_size * block_size

    def part(start: Int[Array, ""] | int, width: int) -> PartialAttention:
        def rows(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, width, axis)

        return partial_attention(
            queries, rows(keys, -2), rows(values, -2), rows(log_weights, -1), **options
        )

    state = part(whole, count - whole) if whole < count else part(0, block_size)
    starts = jnp.arange(0 if whole < count else block_size, whole, block_size)
    state, _ = jax.lax.scan(
        lambda carry, start: (merge(carry, part(start, block_size)), None), state, starts
    )
    return state


def with_sinks(state: PartialAttention, sink_logits: Array | None) -> PartialAttention:
    """A state with sink logits, one a head or one a query."""
    if sink_logits is None:
        return state
    logits = jnp.asarray(sink_logits)
    logits = logits if logits.ndim == state.total.ndim else logits[..., None]
    return merge(state, sink_state(logits, state))
