"""PyramidKV's split: budgets that fall linearly from layer to layer."""

import itertools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from coreset_jax._src import meshes
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.driver import Cache
from coreset_jax._src.core.info import Info
from coreset_jax.budgets.shared import Budget, alike
from coreset_jax.budgets.split import check_axes, resolve_axes


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


class pyramid(Budget):  # noqa: N801
    r"""Budgets that fall linearly from the first layer to the last, as in PyramidKV.

    .. math:: m_l = m_0 - (m_0 - m_{L-1}) \frac{l}{L - 1}, \qquad
       m_{L-1} = \frac m\beta, \quad m_0 = 2m - m_{L-1}

    for the mean :math:`m` = ``size``. Early layers spread their attention, late ones draw it
    together. No layer has less than one pair, and where :math:`m_0` is more than the cache holds,
    :math:`m_0 = n` and :math:`m_{L-1} = 2m - n`. Heads of a layer have the same budget, which
    depends on shapes alone. Time is that of the compressor. Layers of one size are compressed
    together, with ``fold_in(rng, l)`` for the first of them.

    Args:
      compressor: any compressor.
      beta: :math:`\beta \ge 1`; the authors' code has 20. With 1 all layers are alike, and the
        result is that of the compressor.
      axis: the leading axis of keys that is the layers.

    A compressor; see :class:`coreset_jax.Compressor`. Its coresets have the slots of the first
    layer, :math:`m_0`; later layers leave some empty. ``size >= n`` returns what the compressor
    returns.

    Raises:
      ValueError: on bad options; when called, if keys have no such axis.

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

    beta: float = 20.0
    axis: int = 0

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_bounded("beta", least=1.0)
        check_axes("axis", (self.axis,))

    def sizes(self, shape: tuple[int, ...], size: int) -> tuple[int, ...]:
        """The budgets of the layers, one after another."""
        (axis,) = resolve_axes("axis", (self.axis,), shape[:-2])
        if size >= shape[-2] or not shape[axis]:
            return (size,)
        return layer_budgets(shape[axis], size, shape[-2], self.beta)

    def on_heads(self, cache: Cache, size: int) -> tuple[Coreset, Info]:
        """Compresses layers of one size together, and puts them on one another."""
        budgets = self.sizes(cache.keys.shape, size)
        if len(set(budgets)) == 1:
            return self.at_size(cache, size)
        (axis,) = resolve_axes("axis", (self.axis,), cache.keys.shape[:-2])
        keys, axes = cache.keys, cache.keys.ndim - 2
        # Layers of one size may be on several devices.
        cache, compressor = meshes.gathered(axis, (cache, self.compressor))
        parts, start = [], 0
        for budget, equal in itertools.groupby(budgets):
            stop = start + len(list(equal))

            def some(array: Array, start: int = start, stop: int = stop) -> Array:
                # Options that are one number for all heads have no layers.
                return jax.lax.slice_in_dim(array, start, stop, axis=axis) if array.ndim else array

            arrays = ("keys", "values", "lengths", "queries", "scores")
            part = cache._replace(
                rng=jax.random.fold_in(cache.rng, start),
                **{name: jax.tree.map(some, getattr(cache, name)) for name in arrays},
            )
            parts.append(jax.tree.map(some, compressor).on_heads(part, budget))
            start = stop
        layered: tuple[Coreset, Info] = jax.tree.map(
            lambda *several: jnp.concatenate(several, axis=axis), *alike(parts, max(budgets))
        )
        return meshes.alike(axes, keys, layered)[1]
