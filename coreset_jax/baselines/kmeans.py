"""Clusters of keys, each behind its mean: the idea of SubGen, with k-means for its clustering."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coreset_jax._src.core.compressor import Compressor
from coreset_jax._src.core.coreset import Coreset, gather
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.precision import matmul

# Distances of one head that are held at a time.
_DISTANCES = 2**21


def _seeds(
    rng: Array, points: Float[Array, "n d"], inside: Bool[Array, " n"], size: int
) -> Float[Array, "m d"]:
    """Points drawn one after another, with probability as their squared distance to those before.

    Every point waits an exponential time at the rate of its squared distance, and the first to
    come is drawn. Such times have no memory: the others wait on at their new rates, and one set of
    random numbers does for all draws.
    """
    waits = jax.random.exponential(rng, inside.shape, points.dtype)
    squares = inside.astype(points.dtype)

    def draw(
        waits: Array, squares: Array
    ) -> tuple[Float[Array, " n"], Float[Array, " n"], Float[Array, " d"]]:
        times = jnp.where(squares > 0, waits / squares, jnp.inf)
        first = jnp.argmin(times)
        passed = jnp.maximum(waits - squares * times[first], 0)
        point = points[first]
        apart = jnp.sum(jnp.square(points - point[None]), axis=-1)
        return jnp.where(squares > 0, passed, waits), jnp.where(inside, apart, 0), point

    # The first draw is at equal rates.
    waits, squares, point = draw(waits, squares)

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
        waits, squares = state
        waits, apart, point = draw(waits, squares)
        return (waits, jnp.minimum(squares, apart)), point

    _, points = jax.lax.scan(step, (waits, squares), None, length=size - 1)
    return jnp.concatenate([point[None], points])


def _nearest(
    points: Float[Array, "n d"], centers: Float[Array, "m d"], block_size: int
) -> tuple[Int[Array, " n"], Float[Array, " n"]]:
    """The nearest center of every point, of equal ones the first, and its squared distance."""
    halves = jnp.sum(jnp.square(centers), axis=-1) / 2

    def nearest(point: Float[Array, " d"]) -> tuple[Int[Array, ""], Float[Array, ""]]:
        products = matmul(centers, point)
        distances = halves - products
        return jnp.argmin(distances).astype(jnp.int32), jnp.min(distances)

    clusters, distances = jax.lax.map(nearest, points, batch_size=block_size)
    squares = 2 * distances + jnp.sum(jnp.square(points), axis=-1)
    return clusters, jnp.maximum(squares, 0)


def _totals(
    rows: Float[Array, "n c"], clusters: Int[Array, " n"], size: int
) -> Float[Array, "m c"]:
    """The sum of the rows of each cluster; those of cluster ``size`` are left out."""
    return jnp.zeros_like(rows, shape=(size, rows.shape[-1])).at[clusters].add(rows, mode="drop")


def lloyd_step(
    points: Float[Array, "n d"],
    centers: Float[Array, "m d"],
    inside: Bool[Array, " n"],
    *,
    block_size: int,
) -> Float[Array, "m d"]:
    """Moves centers to the means of the points nearest to them: one of Lloyd's steps.

    A center that nothing is near to takes the place of a point that is far from its own. The sum
    of the squared distances to the nearest center never grows.

    Args:
      points: points ``[n, d]``.
      centers: centers ``[m, d]``.
      inside: which points count ``[n]``.
      block_size: points whose distances to all centers may be held at a time.
    """
    size = centers.shape[0]
    clusters, squares = _nearest(points, centers, block_size)
    clusters = jnp.where(inside, clusters, size)
    counts = _totals(inside.astype(points.dtype)[:, None], clusters, size)
    means = _totals(points, clusters, size) / jnp.maximum(counts, 1)
    empty = counts[:, 0] == 0
    _, far = jax.lax.top_k(jnp.where(inside, squares, -1), size)
    return jnp.where(empty[:, None], points[far[jnp.cumsum(empty) - 1]], means)


def cluster(head: Head, *, size: int, iterations: int) -> Coreset:
    """The means of the clusters of one head, in the order of the keys nearest to them."""
    block_size = min(max(_DISTANCES // size, 1), head.count)
    keys, values, inside, dtype = head.keys, head.values, head.inside, head.dtype
    length = head.length
    positions = jnp.zeros_like(keys[:, 0], jnp.int32) + jnp.arange(head.count, dtype=jnp.int32)
    rows = jnp.concatenate([keys.astype(dtype), values.astype(dtype)], axis=-1)
    width = keys.shape[-1]
    # Squared distances come from inner products, which lose less near the origin.
    center = jnp.sum(rows[:, :width], axis=0) / length.astype(dtype)
    points = jnp.where(inside[:, None], rows[:, :width] - center[None], 0)

    centers = _seeds(head.key, points, inside, size)
    centers, _ = jax.lax.scan(
        lambda centers, _: (lloyd_step(points, centers, inside, block_size=block_size), None),
        centers,
        None,
        length=iterations,
    )
    clusters, squares = _nearest(points, centers, block_size)
    clusters = jnp.where(inside, clusters, size)
    ones = inside.astype(dtype)[:, None]
    totals = _totals(jnp.concatenate([rows, ones], axis=-1), clusters, size)
    counts = totals[:, -1]
    means = totals[:, :-1] / jnp.maximum(counts, 1)[:, None]

    # Named after the pair nearest to the center; an empty one has none, and comes last.
    least = jnp.full_like(counts, jnp.inf).at[clusters].min(squares, mode="drop")
    closest = inside & (squares <= least[jnp.minimum(clusters, size - 1)])
    none = jnp.full_like(counts, head.count, dtype=jnp.int32)
    names = none.at[clusters].min(jnp.where(closest, positions, head.count), mode="drop")
    slots = positions[:size]
    indices, order = jax.lax.sort((names, slots), num_keys=1)
    empty = indices >= length
    clustered = gather(
        means[:, :width].astype(keys.dtype),
        means[:, width:].astype(values.dtype),
        jnp.where(empty, -1, order),
        jnp.log(counts[order]),
    )._replace(indices=jnp.where(empty, -1, indices))
    kept = head.pairs(jnp.where(slots < length, slots, -1), jnp.zeros_like(counts))
    return jax.tree.map(lambda few, many: jnp.where(length <= size, few, many), kept, clustered)


class kmeans(Compressor):  # noqa: N801
    r"""Replaces the cache by clusters of its keys: mean key, mean value, and how many they are.

    .. math::
       \min_{c_1, \dots, c_m} \sum_i \min_s \|k_i - c_s\|^2, \qquad
       \bigl(k'_s, v'_s, w_s\bigr) =
         \Bigl(\tfrac1{|C_s|} \sum_{i \in C_s} k_i,\; \tfrac1{|C_s|} \sum_{i \in C_s} v_i,\;
         |C_s|\Bigr)

    with :math:`C_s` the keys nearest to the center :math:`c_s`. Centers start at keys drawn as
    k-means++ draws them and move by a fixed number of Lloyd's steps; one that nothing is near to
    moves to a key far from its own center. The sum never grows from step to step.

    SubGen has clusters of a given radius, found online, with a few uniform samples of each for the
    denominator, and samples of pairs by the norm of their values for the numerator. Here clusters
    are of a given number and their means stand for both.

    Args:
      iterations: Lloyd's steps, 0 or more. Each takes ``n * size * d`` multiplications a head, as
        do the draws, one after another.

    A compressor; see :class:`coreset_jax.Compressor`. Keys and values are **not** those of the
    source, but means in its dtypes; ``indices`` name the pair nearest to each center. Weights sum
    to the length. Where keys repeat there may be fewer clusters than slots, and some stay empty.

    Raises:
      ValueError: on bad options.

    References:
      Zandieh, Han, Mirrokni, Karbasi, *SubGen: Token Generation in Sublinear Time and Memory*,
      2024, arXiv 2402.06082.
      Arthur, Vassilvitskii, *k-means++: the advantages of careful seeding*, SODA 2007.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 128, 16))
    >>> coreset = cj.baselines.kmeans()(jax.random.key(1), keys, values, size=32)
    >>> print(jnp.exp(coreset.log_weights).sum().round(3))
    128.0
    """

    iterations: int = 10
    keeps_pairs = False

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("iterations", 0)

    def fills(self, size: int) -> bool:
        """Where keys repeat there may be fewer clusters."""
        return False

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Clusters the keys."""
        return cluster(head, size=size, iterations=self.iterations), Info()

    def workspace(self, count: int, size: int, width: int) -> int:
        """Distances of a block of points to all centers, and the rows in the dtype of sums."""
        return min(_DISTANCES, count * size) + 3 * count * width
