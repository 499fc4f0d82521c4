"""What every method of shrinking a cache is: options once, then a pure function of a head.

To add one, write a class with a docstring, its options as fields, and ``compress_head``:

    class first(Compressor):
        '''Keeps the first pairs.'''

        def compress_head(self, head, size):
            return head.pairs(jnp.arange(size), jnp.zeros(size, head.dtype)), Info()

It goes into a file of its own: methods of this library beside ``balancing.py``, all others into
``coreset_jax/baselines/``. Declare ``rho``, ``query_norm`` and ``scale`` as leaves if it has use
for them, and set ``keeps_pairs = False`` if its keys or values are not those of the source.

Everything else is done around it (:mod:`coreset_jax._src.core.driver`): checks, masks, random keys,
units, many heads, compilation.
"""

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Integer

from coreset_jax._src import checks
from coreset_jax._src.core import driver
from coreset_jax._src.core.coreset import Coreset, like_source
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.turns import in_turns


class QueryBall(NamedTuple):
    """Which queries a coreset is for, as far as options say it; see :class:`Compressor`."""

    rho: ArrayLike | None = None
    query_norm: ArrayLike | None = None
    scale: ArrayLike | None = None


def leaf(*, default: Any = dataclasses.MISSING, kw_only: bool = True) -> Any:
    """An option that is an array, one number or one a head, or another compressor.

    It may be traced, and differ without a new compilation. Numbers must be positive.
    """
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"leaf": True})


@typing.dataclass_transform(
    frozen_default=True, eq_default=False, kw_only_default=True, field_specifiers=(leaf,)
)
class Compressor:
    """A method of shrinking a cache with its options: a frozen dataclass and a pytree.

    Fields made by :func:`leaf` are leaves, all others are static and hashable. Compressors with
    equal options are equal, hash alike and share their compiled programs.

    Attributes:
      rho: the radius of unit queries, or ``None``; see :func:`coreset_jax.geometry.standardize`.
      query_norm: largest norm of a raw query, or ``None``.
      scale: the softmax scale, or ``None`` for ``1/sqrt(d)``.
      needs_queries: whether it cannot do without sample queries.
      keeps_pairs: whether what it keeps are pairs of the source, bit by bit.
      signed: whether it returns a :class:`~coreset_jax.baselines.SignedCoreset`.
      composite: whether it only puts other compressors together, each of which goes through heads
        and chunks in turns of its own.
      of_products: whether most of its work is large matrix products, and not many small steps.
    """

    rho: ArrayLike | None = None
    query_norm: ArrayLike | None = None
    scale: ArrayLike | None = None
    needs_queries: ClassVar[bool] = False
    keeps_pairs: ClassVar[bool] = True
    signed: ClassVar[bool] = False
    composite: ClassVar[bool] = False
    of_products: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Makes the class a dataclass and registers it with JAX."""
        dataclasses.dataclass(frozen=True, eq=False, kw_only=True)(cls)
        jax.tree_util.register_pytree_with_keys(
            cls,
            lambda self: (
                [(jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in cls._leaves()],
                tuple(getattr(self, name) for name in cls._statics()),
            ),
            cls._rebuilt,
        )

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on bad options."""
        for name, value in self._arrays():
            checks.check_positive(name, value, np.shape(value))
        if self.rho is not None and self.query_norm is not None:
            raise ValueError("rho and query_norm both name the query radius; give one of them.")
        self.validate()

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options; for subclasses to define."""

    def static_count(self, name: str, least: int = 1) -> None:
        """Makes a static option a Python int; raises ``ValueError`` if it is none or too small."""
        checks.check_count(name, getattr(self, name), least)
        object.__setattr__(self, name, int(getattr(self, name)))

    def static_float(self, name: str, *, positive: bool = True) -> None:
        """Makes a static option a Python float; raises ``ValueError`` if it is no such number."""
        value = checks.static_float(name, getattr(self, name), positive=positive)
        if value is None:
            raise ValueError(f"{name} must be a number, got None.")
        object.__setattr__(self, name, value)

    @property
    def query_ball(self) -> QueryBall:
        """Which queries it is made for."""
        return QueryBall(self.rho, self.query_norm, self.scale)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """The coreset of one head in ``size`` slots, and what happened; for subclasses to define.

        Args:
          head: the head. ``size`` is below ``head.count``, padding included, but may exceed
            ``head.length``, and then all valid pairs must be kept.
          size: slots, static.
        """
        raise NotImplementedError

    def fills(self, size: int) -> bool:
        """Whether none of ``size`` slots is empty in heads of as many pairs."""
        return True

    def on_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """The coreset of one head, which is the head itself where ``size`` is enough for it."""
        if size >= head.count:
            return head.whole(), Info()
        if self.composite:
            return self.compress_head(head, size)

        def compress(self: Compressor, head: Head) -> tuple[Coreset, Info]:
            return self.compress_head(head, size)

        workspace = self.workspace(head.count, size, head.width)
        turns = in_turns(compress, workspace, of_products=self.of_products)
        if not self.chooses:
            return turns(self, head)
        # A choice has no derivative, and what is chosen has that of its source.
        coreset, info = turns(*jax.lax.stop_gradient((self, head)))
        return like_source(coreset, head.keys, head.values), info

    def on_heads(self, cache: driver.Cache, size: int) -> tuple[Coreset, Info]:
        """The coresets of all heads; for methods that share something between heads to define."""
        return driver.over_heads(self, cache, size)

    def workspace(self, count: int, size: int, width: int) -> int:
        """Numbers that the intermediate results of one head take.

        Args:
          count: pairs of the head.
          size: slots.
          width: numbers in a key and a value together.
        """
        del size
        return count * width

    @property
    def chooses(self) -> bool:
        """Whether it only chooses pairs; their weights count as constants in derivatives."""
        return self.keeps_pairs

    @property
    def reads_queries(self) -> bool:
        """Whether sample queries change what it returns."""
        ball = self.query_ball
        unknown = ball.rho is None and ball.query_norm is None
        return self.needs_queries or ("query_norm" in self._leaves() and unknown)

    @property
    def reads_scores(self) -> bool:
        """Whether scores of the pairs change what it returns."""
        return any(child.reads_scores for child in self._children())

    def __call__(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Integer[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
        scores: Float[Array, "*heads n"] | None = None,
    ) -> Coreset:
        """Keeps at most ``size`` pairs of each head.

        A pure function of its arguments: it may be jitted (``size`` static) and vmapped. Arrays may
        be sharded over their leading axes, and results are then (``docs/shard-over-devices.md``).
        Heads come before pairs; :func:`coreset_jax.compress` says what becomes of arrays
        ``[batch, length, heads, d]``.

        Args:
          rng: a JAX random key; every head gets a fold of its own.
          keys: cached keys ``[..., n, d]``, any float dtype.
          values: cached values ``[..., n, dv]``.
          size: pairs to keep for each head, static.
          lengths: valid pairs of each head ``[...]``; the rest is padding and may hold anything.
          queries: sample queries ``[..., q, d]`` for methods that want them.
          scores: the largest attention weight that any query gave each pair ``[..., n]``, for
            methods that want it and would else have to find it from ``queries``, which are fewer;
            see :mod:`coreset_jax.queries`.

        Returns:
          A coreset with ``min(size, n)`` slots a head; ``size >= n`` returns the cache itself. A
          head with a NaN or an infinity among its pairs, or among the samples that are used, has
          NaN log-weights.

        Its derivatives are those of the function with the choice of pairs held, which is constant
        almost everywhere: pairs that are kept have those of the pairs of the source, and fits those
        of what they solve. Weights that a choice brings with it count as constants. In reverse mode
        only.

        Raises:
          ValueError: on ill-fitting shapes, a ``size`` below 1, ``lengths`` outside ``1..n``,
            a sequence that is sharded, options that fit no head, or missing ``queries``, before any
            tracing.
        """
        return driver.compress(self, rng, keys, values, size, lengths, queries, scores, False)[0]

    def with_info(
        self,
        rng: Array,
        keys: Float[Array, "*heads n d"],
        values: Float[Array, "*heads n dv"],
        *,
        size: int,
        lengths: Integer[Array, "*heads"] | None = None,
        queries: Float[Array, "*heads q d"] | None = None,
        scores: Float[Array, "*heads n"] | None = None,
    ) -> tuple[Coreset, Info]:
        """The same coreset, and what happened on the way to it.

        Arguments and errors are those of a call. The errors of fits in the kernel take a pass over
        all pairs of pairs: this is for looking, not for serving.
        """
        return driver.compress(self, rng, keys, values, size, lengths, queries, scores, True)

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless a call can be answered; for subclasses to extend.

        Args:
          keys: keys ``[..., n, d]``, checked.
          size: pairs to keep.
          queries: sample queries that fit the keys, or ``None``.
        """
        for name, value in self._arrays():
            checks.check_positive(name, value, keys.shape[:-2])
        if self.needs_queries and (queries is None or queries.shape[-2] < 1):
            raise ValueError(
                f"queries must be given to {type(self).__name__}, [..., q, {keys.shape[-1]}] "
                f"with q at least 1 and the leading axes of keys {keys.shape}; "
                f"got {None if queries is None else queries.shape}."
            )
        for child in self._children():
            child.check_call(keys, size, queries)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Compressor) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple[Any, ...]:
        def hashable(value: Any) -> Any:
            if value is None or isinstance(value, Compressor):
                return value
            if not checks.is_number(value):
                return id(value)
            array = np.asarray(value, np.float64)
            return array.shape, array.tobytes()

        leaves = tuple(hashable(getattr(self, name)) for name in self._leaves())
        return type(self), leaves, tuple(getattr(self, name) for name in self._statics())

    def _arrays(self) -> list[tuple[str, Any]]:
        values = [(name, getattr(self, name)) for name in self._leaves()]
        return [each for each in values if not isinstance(each[1], Compressor)]

    def _children(self) -> list["Compressor"]:
        values = [getattr(self, name) for name in self._leaves()]
        return [each for each in values if isinstance(each, Compressor)]

    @classmethod
    def _leaves(cls) -> list[str]:
        fields = dataclasses.fields(typing.cast(Any, cls))
        return [field.name for field in fields if field.metadata.get("leaf")]

    @classmethod
    def _statics(cls) -> list[str]:
        fields = dataclasses.fields(typing.cast(Any, cls))
        return [field.name for field in fields if not field.metadata.get("leaf")]

    @classmethod
    def _rebuilt(cls, statics: tuple[Any, ...], leaves: Iterable[Any]) -> "Compressor":
        # Unchecked: while JAX handles it, leaves may be anything.
        self = object.__new__(cls)
        for name, value in (*zip(cls._leaves(), leaves), *zip(cls._statics(), statics)):  # noqa: B905
            object.__setattr__(self, name, value)
        return self


class Wrapper(Compressor):
    """A compressor that does something before or after another one.

    Queries have the radius and the scale that the inner one was given, unless it has its own.

    Attributes:
      compressor: the inner compressor.
    """

    compressor: Compressor = leaf(kw_only=False)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on bad options."""
        if not isinstance(self.compressor, Compressor):
            raise ValueError(f"compressor must be a Compressor, got {self.compressor!r}.")
        super().__post_init__()

    @property
    def query_ball(self) -> QueryBall:
        """Which queries it is made for."""
        inner = self.compressor.query_ball
        scale = inner.scale if self.scale is None else self.scale
        if self.rho is None and self.query_norm is None:
            return inner._replace(scale=scale)
        return QueryBall(self.rho, self.query_norm, scale)

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        """Whether the inner compressor cannot do without sample queries."""
        return self.compressor.needs_queries

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        """Whether the inner compressor keeps pairs of the source."""
        return self.compressor.keeps_pairs

    @property
    def chooses(self) -> bool:
        """Whether it only chooses pairs: what is around a choice has derivatives of its own."""
        return False

    @property
    def signed(self) -> bool:  # type: ignore[override]
        """Whether the inner compressor returns signed coresets."""
        return self.compressor.signed

    @property
    def composite(self) -> bool:  # type: ignore[override]
        """Whether the inner compressor only puts others together."""
        return self.compressor.composite

    @property
    def of_products(self) -> bool:  # type: ignore[override]
        """Whether most of the inner compressor's work is large matrix products."""
        return self.compressor.of_products

    def fills(self, size: int) -> bool:
        """Whether the inner compressor leaves no slot empty."""
        return self.compressor.fills(size)

    @property
    def reads_queries(self) -> bool:
        """Whether sample queries change what it returns."""
        return super().reads_queries or self.compressor.reads_queries

    def workspace(self, count: int, size: int, width: int) -> int:
        """Numbers that the intermediate results of one head take."""
        return self.compressor.workspace(count, size, width)
