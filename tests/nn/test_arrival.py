"""What a cache holds of a prompt hardly depends on how its tokens arrive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coreset_jax.nn import CacheConfig, CoresetCache
from experiments.leaderboard import texts, work
from experiments.model import lm

LENGTH, CONFIG = 4096, CacheConfig(size=512)


@pytest.fixture(scope="module")
def prompt():
    """Keys, values and what follows asks of them, of all layers of the shipped model."""
    model, _ = lm.load()
    tokens = texts.passages("prose", 1, LENGTH + 256, 0)
    read = work.read_texts(model, tokens, LENGTH, 64)
    by_length = (array[0].swapaxes(1, 2) for array in (read.keys, read.values, read.asked))
    return *by_length, read.exact[0]


def arrived(prompt, chunks):
    keys, values = prompt[:2]
    cache = CoresetCache.init(CONFIG, jax.random.key(0), keys, values)
    step = LENGTH // chunks
    parts = [array.reshape(-1, chunks, step, *array.shape[2:]) for array in (keys, values)]
    parts = [jnp.moveaxis(array, 1, 0) for array in parts]
    if step > 1:
        cache = cache.prefill(*(array[0] for array in parts))
        parts = [array[1:] for array in parts]
    return jax.lax.scan(lambda cache, part: (cache.append(*part), None), cache, tuple(parts))[0]


def error(cache, prompt):
    asked, exact = prompt[2], np.asarray(prompt[3])
    found = np.asarray(cache.attend(asked).swapaxes(1, 2))
    scale = np.linalg.norm(exact, axis=-1).mean(axis=-1)
    errors = np.linalg.norm(found - exact, axis=-1).mean(axis=-1) / scale
    return np.exp(np.log(errors).mean())


@pytest.fixture(scope="module")
def at_once(prompt):
    return error(arrived(prompt, 1), prompt)


@pytest.mark.slow
@pytest.mark.parametrize(("chunks", "most"), [(2, 1.3), (4, 1.3), (16, 1.3), (LENGTH, 2.0)])
def test_errors_are_nearly_those_of_one_call(prompt, at_once, chunks, most):
    assert error(arrived(prompt, chunks), prompt) <= most * at_once


@pytest.mark.slow
def test_pairs_that_arrive_weigh_as_many_as_they_are(prompt):
    cache = arrived(prompt, 16)
    held = cache.middle.pairs.weights.sum(axis=-1)
    expected = LENGTH - CONFIG.sinks - cache.filled[:, None]
    np.testing.assert_allclose(held, np.broadcast_to(expected, held.shape), rtol=1e-5)


@pytest.mark.parametrize("before", [0, 2, 30, 60])
def test_chunks_of_a_ragged_batch_are_as_if_alone(sequences, empty_cache, before):
    """Whatever is held already: sinks that are not full, a window, or a middle."""
    cache = empty_cache()
    if before:
        cache = cache.append(*(array[:, :before] for array in sequences[1:]))
    lengths = jnp.array([40, 0, 13, 3])
    new = [array[:, before : before + 40] for array in sequences[1:]]
    found = cache.append(*new, lengths)
    for row, count in enumerate(lengths.tolist()):
        expected = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], cache)
        for start in range(0, count, 40):
            expected = expected.append(*(a[row : row + 1, start:count] for a in new))
        queries = sequences.queries[row : row + 1, :5]
        one = jax.tree.map(lambda leaf, row=row: leaf[row : row + 1], found)
        np.testing.assert_array_equal(one.lengths, before + count)
        np.testing.assert_array_equal(one.positions[..., :4], expected.positions[..., :4])
        if count in (0, 40) or before + count <= 40:
            np.testing.assert_allclose(
                one.attend(queries), expected.attend(queries), rtol=1e-4, atol=1e-5
            )
