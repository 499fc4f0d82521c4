"""Of two methods the one that answers better: judged head by head, by sample queries held back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from coreset_jax._src.core.compressor import Compressor, QueryBall, Wrapper, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.scale import shared_scale
from coreset_jax._src.fit.query_targets import evaluate
from coreset_jax.budgets.shared import alike

# One sample of so many is held back.
_HELD_BACK = 8


class better_of(Wrapper):  # noqa: N801
    r"""Compresses each head by two methods, and keeps the coreset that answers better.

    .. math:: e = \sum_{j \in \mathrm{held\ back}} \| \mathrm{Attn}(q_j) - \mathrm{Attn}'(q_j) \|^2

    One of eight sample queries is held back: neither method sees it, and the smaller :math:`e`
    wins. So a method that suits most heads of a model may be used for all of them, beside one that
    suits the others. Time is that of both.

    Args:
      compressor: a method; it wins where both are equal.
      other: another one. The softmax scale of both is the one that either was given.

    A compressor; see :class:`coreset_jax.Compressor`. It wants sample ``queries`` when called, two
    at least.

    Raises:
      ValueError: on bad options; when called, if there are fewer than two ``queries``.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 4, 512, 16))
    >>> compressor = cj.better_of(cj.baselines.top_attention(), cj.baselines.kmeans())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> coreset.keys.shape
    (4, 64, 16)
    """

    other: Compressor = leaf(kw_only=False)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on bad options."""
        super().__post_init__()
        if not isinstance(self.other, Compressor):
            raise ValueError(f"other must be a Compressor, got {self.other!r}.")
        if self.other.signed or self.compressor.signed:
            raise ValueError("neither compressor may return signed coresets.")
        shared_scale("both compressors", *(each.query_ball.scale for each in self._children()))

    @property
    def query_ball(self) -> QueryBall:
        """Which queries it is made for: as the first method has it, or else the other."""
        ball = super().query_ball
        return ball._replace(scale=self.other.query_ball.scale) if ball.scale is None else ball

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        """Samples are what it judges by."""
        return True

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        """Whether both keep pairs of the source."""
        return self.compressor.keeps_pairs and self.other.keeps_pairs

    @property
    def composite(self) -> bool:  # type: ignore[override]
        """Each goes through heads in turns of its own."""
        return True

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless a call can be answered."""
        super().check_call(keys, size, queries)
        if queries.shape[-2] < 2:
            raise ValueError(
                f"queries must be at least two, of which one is held back; got {queries.shape}."
            )

    def fills(self, size: int) -> bool:
        """Whether neither leaves a slot empty."""
        return self.compressor.fills(size) and self.other.fills(size)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Compresses the head twice, and judges."""
        assert head.queries is not None
        count = head.queries.shape[0]
        judging = np.arange(count) % _HELD_BACK == min(_HELD_BACK // 2, count - 1)
        seen, judge = (
            dataclasses.replace(head, queries=head.queries[np.flatnonzero(some)])
            for some in (~judging, judging)
        )
        found = [each.on_head(seen, size) for each in (self.compressor, self.other)]
        slots = max(coreset.keys.shape[0] for coreset, _ in found)
        (first, info), (second, other_info) = alike(found, slots)
        better = _error(judge, second) < _error(judge, first)

        def take(one: Array, other: Array) -> Array:
            return jnp.where(better, other, one)

        return jax.tree.map(take, (first, info), (second, other_info))


def _error(head: Head, coreset: Coreset) -> Float[Array, ""]:
    """The mean squared error of a coreset for the samples of a head."""
    targets = evaluate(head, coreset.keys, jnp.isfinite(coreset.log_weights))
    return jnp.mean(targets.squared_errors(coreset.values, coreset.log_weights))
