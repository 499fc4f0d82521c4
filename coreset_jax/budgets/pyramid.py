"""PyramidKV's split: budgets that fall linearly from layer to layer."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coreset_jax import validation
from coreset_jax.budgets.split import alike, check_compressor, check_multiple, resolve_axes
from coreset_jax.coreset import Compressor, Coreset


def layer_budgets(layers: int, size: int, count: int, beta: float) -> tuple[int, ...]:
    r"""The budget of every layer: linear, descending, with the mean ``size``.

    .. math:: m_l = m_0 - (m_0 - m_{L-1}) \frac{l}{L - 1}, \qquad
       m_{L-1} = \frac m\beta, \quad m_0 = 2m - m_{L-1}

    Where that would be more than the cache holds, :math:`m_0 = n` and :math:`m_{L-1} = 2m - n`; no
    layer has less than one pair. Rounded down, and the pairs that this leaves go one each to the
    first layers.

    Args:
      layers: :math:`L`.
      size: :math:`m`, at most ``count``.
      count: pairs of a head, :math:`n`.
      beta: :math:`\beta \ge 1`.

    >>> layer_budgets(4, 64, 1000, beta=20.0)
    (125, 85, 43, 3)
    >>> layer_budgets(4, 64, 100, beta=20.0)
    (100, 76, 52, 28)
    """
    if layers == 1:
        return (size,)
    last = max(size / beta, 1.0)
    first = min(2 * size - last, float(count))
    fall = 2 * (first - size) / (layers - 1)
    # Rounding must not take a pair from a budget that is whole.
    budgets = [int(first - fall * layer + 1e-6) for layer in range(layers)]
    left = layers * size - sum(budgets)
    # To the first layers that still have a pair to spare.
    for layer in [layer for layer, each in enumerate(budgets) if each < count][:left]:
        budgets[layer] += 1
    return tuple(budgets)


@dataclasses.dataclass(frozen=True)
class _Pyramid:
    compressor: Compressor
    beta: float
    axis: int

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
        if queries is not None:
            validation.check_queries(queries, keys)
        (axis,) = resolve_axes("axis", (self.axis,), keys)
        count, layers = keys.shape[-2], keys.shape[axis]
        budgets = (size,) * layers
        if size < count and layers:
            budgets = layer_budgets(layers, int(size), count, self.beta)
        if len(set(budgets)) < 2:
            return self.compressor(rng, keys, values, size=size, lengths=lengths, queries=queries)
        parts, start = [], 0
        for budget, equal in itertools.groupby(budgets):
            stop = start + len(list(equal))

            def some(array: Array, start: int = start, stop: int = stop) -> Array:
                return jax.lax.slice_in_dim(jnp.asarray(array), start, stop, axis=axis)

            part = self.compressor(
                jax.random.fold_in(rng, start),
                some(keys),
                some(values),
                size=budget,
                lengths=None if lengths is None else some(lengths),
                queries=None if queries is None else some(queries),
            )
            parts.append(part)
            start = stop
        together = alike(parts, max(budgets))
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=axis), *together)


def pyramid(compressor: Compressor, *, beta: float = 20.0, axis: int = 0) -> Compressor:
    r"""Budgets that fall linearly from the first layer to the last, as in PyramidKV.

    .. math:: m_l = m_0 - (m_0 - m_{L-1}) \frac{l}{L - 1}, \qquad
       m_{L-1} = \frac m\beta, \quad m_0 = 2m - m_{L-1}

    for the mean :math:`m` = ``size``. Early layers spread their attention, late ones draw it
    together. No layer has less than one pair, and where :math:`m_0` is more than the cache holds,
    :math:`m_0 = n` and :math:`m_{L-1} = 2m - n`. Heads of a layer have the same budget.

    The budgets depend on shapes alone. Layers of one size are compressed by one call, with
    ``fold_in(rng, l)`` for the first of them: time is that of the compressor, and a program is
    compiled for every size. Options of the compressor that are one a head do not fit a part of
    the layers.

    Args:
      compressor: any compressor.
      beta: :math:`\beta \ge 1`; the authors' code has 20. With 1 all layers are alike, and the
        result is that of the compressor.
      axis: the leading axis of keys that is the layers.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [layers, ..., n, d], values
      [layers, ..., n, dv], *, size, lengths=None, queries=None) -> Coreset``. It has the slots of
      the first layer, :math:`m_0`; later layers leave some empty. Everything else is as the
      compressor has it: ``queries`` and normalizers pass through, and ``size >= n`` returns what it
      returns. The call raises ``ValueError`` if keys have no such axis, if ``queries`` do not fit,
      and as the compressor does.

    Raises:
      ValueError: if ``compressor`` cannot be called, ``beta`` is below 1 or ``axis`` no integer.

    References:
      Cai et al., *PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information
      Funneling*, 2024, arXiv 2406.02069, Section 4.2.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 4, 2, 512, 16))
    >>> compressor = cj.budgets.pyramid(cj.baselines.uniform())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> coreset.keys.shape
    (4, 2, 125, 16)
    >>> print((coreset.indices >= 0).sum(axis=-1)[:, 0])
    [125  85  43   3]
    """
    check_compressor(compressor)
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise ValueError(f"axis must be a static Python int, got {axis!r}.")
    return _Pyramid(compressor, check_multiple("beta", beta), axis)
