"""Walks: balanced signs, faithful to their definitions, and as strong as their theorems."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax import walks
from tests import brute_force

WALKS = {
    "greedy_pairs": walks.greedy_pairs,
    "self_balancing": walks.self_balancing,
    "gram_schmidt": walks.gram_schmidt,
}
BLOCK, WIDTH, RUNS = 16, 5, 64
RUN_KEYS = jax.random.split(jax.random.key(0), RUNS)


def unit_vectors(seed, count, width):
    vectors = np.random.default_rng(seed).standard_normal((count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    return unit_vectors(0, BLOCK, WIDTH)


@pytest.fixture(scope="module")
def standing():
    """A discrepancy that is there already."""
    return np.array([3.0, -1.0, 0.5, 0.0, -2.0])


@pytest.fixture(scope="module")
def problem(vectors, standing):
    return np.float32(vectors @ vectors.T), np.float32(vectors @ standing)


@functools.cache
def over_runs(walk):
    """The walk with a key, a field and a count for each run."""
    return jax.jit(jax.vmap(walk, in_axes=(0, None, 0, 0)))


def run(walk, gram, field, count=BLOCK, rngs=RUN_KEYS):
    fields = np.broadcast_to(field, (len(rngs), len(gram)))
    return np.asarray(over_runs(walk)(rngs, gram, fields, np.full(len(rngs), count)))


@pytest.fixture(params=WALKS)
def walk(request):
    return WALKS[request.param]


def test_signs_are_balanced_for_every_even_count(walk, problem):
    gram, field = problem
    counts = np.resize(np.arange(0, BLOCK + 1, 2), RUNS)
    fields = np.linspace(0, 1, RUNS, dtype=np.float32)[:, None] * field
    signs = np.asarray(over_runs(walk)(RUN_KEYS, gram, fields, counts))
    inside = np.arange(BLOCK) < counts[:, None]
    np.testing.assert_array_equal(np.abs(signs), inside)
    np.testing.assert_array_equal(signs.sum(axis=1), 0)


def test_what_lies_beyond_the_count_does_not_matter(walk, problem):
    gram, field = (array.copy() for array in problem)
    signs = run(walk, gram, field, count=10)
    gram[10:] = gram[:, 10:] = field[10:] = 0
    np.testing.assert_array_equal(run(walk, gram, field, count=10), signs)


def test_same_rng_same_signs(walk, problem):
    signs = run(walk, *problem)
    np.testing.assert_array_equal(run(walk, *problem), signs)
    if walk is not walks.greedy_pairs:
        free = run(walk, problem[0], 0 * problem[1])
        assert len({tuple(row) for row in free}) > RUNS // 4


def test_the_field_is_cancelled(walk, vectors, standing, problem):
    gram, field = problem
    blind = standing + run(walk, gram, 0 * field) @ vectors
    seeing = standing + run(walk, gram, field) @ vectors
    energies = [np.mean(np.sum(np.square(rows), axis=1)) for rows in (blind, seeing)]
    assert energies[1] < 0.7 * energies[0]


def test_degenerate_gram_matrices_still_give_balanced_signs(walk):
    ones = np.ones((BLOCK, BLOCK), np.float32)
    for gram in (0 * ones, ones, 1e-20 * ones, np.diag(np.arange(BLOCK) % 2).astype(np.float32)):
        signs = run(walk, gram, 0 * gram[0])
        np.testing.assert_array_equal(np.abs(signs), 1)
        np.testing.assert_array_equal(signs.sum(axis=1), 0)


def test_greedy_takes_the_shorter_sum_at_every_step(vectors, standing, problem):
    gram, field = problem
    for start in (0.0, 1.0):
        total, expected = start * standing, []
        for first, second in zip(vectors[0::2], vectors[1::2], strict=True):
            step = first - second
            sign = min((1, -1), key=lambda sign, at=total, by=step: np.linalg.norm(at + sign * by))
            total = total + sign * step
            expected += [sign, -sign]
        found = run(walks.greedy_pairs, gram, np.float32(start) * field)
        np.testing.assert_array_equal(found[0], expected)


@jax.jit
def self_balancing_runs(rngs, gram, field, constant):
    walk = functools.partial(walks.self_balancing, constant=constant)
    uniforms = jax.vmap(lambda rng: jax.random.uniform(rng, (BLOCK // 2,)))(rngs)
    return jax.vmap(walk, in_axes=(0, None, None, None))(rngs, gram, field, BLOCK), uniforms


@pytest.mark.parametrize(("constant", "length"), [(0.1, 1.0), (1.0, 3.0), (10.0, 0.1)])
def test_self_balancing_follows_its_probabilities(vectors, standing, problem, constant, length):
    gram, field = (np.float32(length**2) * array for array in problem)
    runs = jax.device_get(self_balancing_runs(RUN_KEYS[:16], gram, field, constant))
    # Steps of norm at most one; what was there before is measured in the same unit.
    steps = (vectors[0::2] - vectors[1::2]) / 2
    clipped = 0
    for row, uniforms in zip(*runs, strict=True):
        total = standing / 2
        for number, step in enumerate(steps):
            probability = 0.5 - step @ total / (2 * constant)
            clipped += not 0 <= probability <= 1
            sign = 1 if uniforms[number] < np.clip(probability, 0, 1) else -1
            assert row[2 * number] == sign == -row[2 * number + 1]
            total = total + sign * step
    assert (clipped > 0) == (constant < 10)


def energy(gram, field, signs):
    gram, field, signs = brute_force.double(gram, field, signs)
    return np.einsum("...i,ij,...j->...", signs, gram, signs) + 2 * signs @ field


@pytest.fixture(scope="module")
def refined(problem):
    """Signs after 0, 1, 2, ... swaps, from signs with zeros among them."""
    gram, field = map(jnp.asarray, problem)
    signs = np.resize(np.float32([1, -1, -1, 1, 1, -1, 0, 1, -1]), BLOCK)

    def refine(max_swaps):
        return walks.swap_refinement(gram, field, jnp.asarray(signs), max_swaps=max_swaps)

    return signs, np.asarray(jax.jit(jax.vmap(refine))(np.arange(2 * BLOCK)))


def test_swaps_keep_the_sum_and_the_zeros(refined):
    signs, rows = refined
    np.testing.assert_array_equal(rows[0], signs)
    np.testing.assert_array_equal(rows.sum(axis=1), signs.sum())
    np.testing.assert_array_equal(np.abs(rows), np.broadcast_to(np.abs(signs), rows.shape))
    assert np.all(np.count_nonzero(rows[1:] != rows[:-1], axis=1) <= 2)


def test_swaps_lower_the_energy_until_none_helps(problem, refined):
    gram, field = brute_force.double(*problem)
    _, rows = refined
    energies = energy(gram, field, rows)
    swaps = np.count_nonzero(np.any(rows[1:] != rows[:-1], axis=1))
    assert swaps > 2
    assert np.all(np.diff(energies)[:swaps] < 0)
    np.testing.assert_array_equal(rows[swaps:], np.broadcast_to(rows[swaps], rows[swaps:].shape))
    # The + whose own flip gains most has no partner left.
    last = rows[-1]
    flips = [(energy(gram, field, flipped(last, i)), i) for i in np.flatnonzero(last > 0)]
    _, drop = min(flips)
    for take in np.flatnonzero(last < 0):
        swapped = flipped(flipped(last, drop), take)
        assert energy(gram, field, swapped) >= energies[-1] - 1e-5


def flipped(signs, place):
    signs = signs.copy()
    signs[place] *= -1
    return signs


def test_nothing_to_swap():
    gram = np.eye(4, dtype=np.float32)
    refine = jax.jit(functools.partial(walks.swap_refinement, max_swaps=5))
    for signs in np.outer([0, 1, -1], np.ones(4, np.float32)):
        np.testing.assert_array_equal(refine(gram, gram[0], np.float32(signs)), signs)


@functools.cache
def rounding(balanced):
    round_one = functools.partial(walks.gram_schmidt_rounding, balanced=balanced)
    return jax.jit(jax.vmap(round_one, in_axes=(0, None, None, None)))


def replay_gram_schmidt(priorities, uniforms, gram, start, alive, *, balanced, ridge=1e-4):
    """The walk by its definition: every direction is solved for afresh."""
    gram = gram + ridge * np.mean(np.diagonal(gram)[alive]) * np.eye(len(gram))
    position, alive = start.copy(), alive.copy()
    for uniform in uniforms:
        places = np.flatnonzero(alive)
        if len(places) == 0 or (balanced and len(places) == 1):
            break
        pivot = places[np.argmax(priorities[places])]
        # Shortest combination with u_p = 1 (and sum 0), by its optimality conditions.
        conditions = np.zeros((1 + balanced, len(places)))
        conditions[0] = places == pivot
        conditions[1:] = 1
        size, bound = len(places), len(conditions)
        system = np.zeros((size + bound, size + bound))
        system[:size, :size] = gram[np.ix_(places, places)]
        system[:size, size:], system[size:, :size] = conditions.T, conditions
        right = np.zeros(size + bound)
        right[size] = 1
        direction = np.zeros_like(start)
        direction[places] = np.linalg.solve(system, right)[:size]
        moving = np.flatnonzero(direction)
        up = (np.sign(direction[moving]) - position[moving]) / direction[moving]
        down = (np.sign(direction[moving]) + position[moving]) / direction[moving]
        goes_up = uniform * (up.min() + down.min()) < down.min()
        frozen = moving[np.argmin(up if goes_up else down)]
        position = position + (up.min() if goes_up else -down.min()) * direction
        position[frozen] = np.round(position[frozen])
        alive[frozen] = False
    return np.round(position)


def uniforms_of(rng, count):
    priority_rng, step_rng = jax.random.split(rng)
    return [jax.random.uniform(each, (count,)) for each in (priority_rng, step_rng)]


@pytest.mark.parametrize("balanced", [False, True])
def test_gram_schmidt_is_its_definition(vectors, balanced, x64):
    gram = vectors @ vectors.T
    alive = np.arange(BLOCK) % 8 != 3
    start = np.where(alive, np.random.default_rng(5).uniform(-0.6, 0.6, BLOCK), -1.0)
    start[0] -= start[alive].sum()
    start[alive] *= 0.5
    rngs = jax.random.split(jax.random.key(1), RUNS)
    draws = jax.device_get(jax.jit(jax.vmap(lambda rng: uniforms_of(rng, BLOCK)))(rngs))
    rounded = np.asarray(rounding(balanced)(rngs, gram, start, alive))
    for signs, *drawn in zip(rounded, *draws, strict=True):
        expected = replay_gram_schmidt(*drawn, gram, start, alive, balanced=balanced)
        np.testing.assert_array_equal(signs, expected)


SUBGAUSSIAN_RUNS, SUBGAUSSIAN_COUNT, SUBGAUSSIAN_WIDTH = 6_000, 24, 8


def subgaussian_vectors(name):
    vectors = unit_vectors(7, SUBGAUSSIAN_COUNT, SUBGAUSSIAN_WIDTH)
    if name == "duplicated":
        vectors[1::2] = vectors[0::2]
        vectors[12:] = vectors[0]
    if name == "near-orthogonal":
        vectors = np.repeat(np.eye(SUBGAUSSIAN_WIDTH), 3, axis=0) + 0.05 * vectors
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if name == "short":
        vectors *= np.linspace(0.1, 1, SUBGAUSSIAN_COUNT)[:, None]
    return vectors


@pytest.mark.slow
def test_gram_schmidt_is_subgaussian_with_constant_one():
    """Banaszczyk's constant: E exp<t, D> <= exp(|t|^2 / 2), and E x is where the walk began."""
    rngs = jax.random.split(jax.random.key(2), SUBGAUSSIAN_RUNS)
    start = np.random.default_rng(8).uniform(-0.5, 0.5, SUBGAUSSIAN_COUNT).astype(np.float32)
    for name in ("random", "duplicated", "near-orthogonal", "short"):
        vectors = subgaussian_vectors(name)
        gram = np.float32(vectors @ vectors.T)
        signs = np.asarray(rounding(False)(rngs, gram, start, np.full(len(vectors), True)))
        np.testing.assert_array_equal(np.abs(signs), 1)

        errors = np.sqrt((1 - np.square(start)) / SUBGAUSSIAN_RUNS)
        assert np.max(np.abs(signs.mean(axis=0) - start) / errors) < 4.5

        discrepancies = (signs - start.astype(np.float64)) @ vectors
        # The worst directions of one half of the runs are judged by the other half.
        chosen, judged = np.split(discrepancies, 2)
        directions = np.concatenate(
            [np.linalg.eigh(chosen.T @ chosen)[1].T, unit_vectors(9, 64, SUBGAUSSIAN_WIDTH)]
        )
        along = judged @ directions.T
        estimates = {"variance": (np.square(along).mean(axis=0), np.square(along).std(axis=0))}
        for length in (0.5, 1.0, 2.0):
            masses = np.exp(length * along)
            means = masses.mean(axis=0)
            estimates[f"|t| = {length}"] = (
                2 * np.log(means) / length**2,
                2 * masses.std(axis=0) / means / length**2,
            )
        for quantity, (squares, deviations) in estimates.items():
            errors = deviations / np.sqrt(len(judged))
            worst = np.argmax(squares)
            print(f"{name}, {quantity}: constant^2 {squares[worst]:.4f} +- {errors[worst]:.4f}")
            assert np.all(squares <= 1 + 4 * errors)


@pytest.mark.slow
def test_balanced_rounding_is_unbiased_and_keeps_the_sum():
    vectors = subgaussian_vectors("random")
    rngs = jax.random.split(jax.random.key(3), 4096)
    gram = np.float32(vectors @ vectors.T)
    for count in (8, 24):
        alive = np.arange(len(vectors)) < count
        start = np.random.default_rng(8).uniform(-0.4, 0.4, len(vectors)).astype(np.float32)
        start[: count // 2] = -start[count // 2 : count]
        start[count:] = 0.25
        signs = np.asarray(rounding(True)(rngs, gram, start, alive))
        np.testing.assert_array_equal(
            np.abs(signs), np.broadcast_to(np.where(alive, 1, 0.25), signs.shape)
        )
        np.testing.assert_array_equal(signs[:, alive].sum(axis=1), 0)
        errors = np.sqrt((1 - np.square(start)) / len(signs))
        assert np.max(np.abs(signs.mean(axis=0) - start)[alive] / errors[alive]) < 4.5


@pytest.mark.slow
def test_gram_schmidt_downdates_stay_stable_in_float32():
    """256 vectors in 8 dimensions: the inverse is all but singular, and downdated to nothing."""
    vectors = unit_vectors(11, 256, 8)
    gram = np.float32(vectors @ vectors.T)
    rngs = jax.random.split(jax.random.key(4), 16)
    start = np.zeros(256, np.float32)
    for balanced in (False, True):
        signs = np.asarray(rounding(balanced)(rngs, gram, start, np.full(256, True)))
        np.testing.assert_array_equal(np.abs(signs), 1)
        if balanced:
            np.testing.assert_array_equal(signs.sum(axis=1), 0)
        squares = np.sum(np.square(signs @ vectors), axis=1)
        # The covariance is at most the identity, here of trace 8; independent signs would give 256.
        assert squares.mean() <= 8 + 4 * squares.std() / np.sqrt(len(squares))
