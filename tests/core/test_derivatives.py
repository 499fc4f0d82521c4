"""Derivatives of compressions against finite differences, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import baselines, refit

PAIRS, WIDTH, SIZE = 60, 6, 24

# What the derivative of a choice leaves out is the change of weights with it: these have none.
COMPRESSORS = {
    "balanced": cj.balanced(),
    "weights": refit.weights(cj.balanced()),
    "nystrom": refit.nystrom(cj.balanced()),
    "moved": refit.move_keys(cj.pivoted()),
    "chunks": cj.chunked(refit.move_keys(cj.pivoted()), chunk_size=8),
    "fitted": cj.fitted(),
    "matching": refit.matching(cj.balanced()),
    "fitted to samples": cj.fitted(),
    "attended": cj.attended(axes=0),
    "better": cj.better_of(cj.attended(), refit.matching(baselines.uniform())),
    "budgets": cj.budgets.by_energy(cj.balanced()),
    "signed": baselines.wildcat(),
    "selected": baselines.snapkv(),
}
FAST = {"balanced", "weights", "selected"}


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    keys, values, queries = rng.standard_normal((3, 2, PAIRS, WIDTH))
    asked, wanted = rng.standard_normal((2, 2, 10, WIDTH))

    def loss(name, arguments):
        keys, values, queries = arguments
        compressor = COMPRESSORS[name]
        given = compressor.needs_queries or name.endswith("samples")
        coreset = compressor(
            jax.random.key(0), keys, values, size=SIZE, queries=queries if given else None
        )
        return jnp.sum(wanted * cj.attend(asked, coreset))

    return loss, tuple(map(jnp.asarray, (keys, values, queries)))


@pytest.mark.parametrize(
    "name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in COMPRESSORS]
)
def test_derivatives_are_those_of_the_function(problem, name):
    loss, arguments = problem
    loss = jax.jit(loss, static_argnums=0)
    found = jax.jit(jax.grad(loss, argnums=1), static_argnums=0)(name, arguments)
    assert jnp.any(found[0] != 0)
    assert jnp.any(found[1] != 0)
    rng = np.random.default_rng(1)
    for number in range(3):
        direction = [np.zeros_like(each) for each in arguments]
        direction[number] = rng.standard_normal(arguments[number].shape)

        def at(step, direction=direction):
            return loss(
                name, tuple(a + step * d for a, d in zip(arguments, direction, strict=True))
            )

        expected = (at(1e-6) - at(-1e-6)) / 2e-6
        np.testing.assert_allclose(
            np.sum(found[number] * direction[number]), expected, rtol=1e-4, atol=1e-6
        )


def test_pairs_that_are_kept_have_the_derivatives_of_their_sources():
    keys, values, asked = jax.random.normal(jax.random.key(0), (3, PAIRS, WIDTH))
    compressor = cj.keep_ends(baselines.uniform())
    held = compressor(jax.random.key(1), keys, values, size=SIZE)

    def compressed(keys, values):
        coreset = compressor(jax.random.key(1), keys, values, size=SIZE)
        return jnp.sum(jnp.sin(cj.attend(asked, coreset)))

    def gathered(keys, values):
        coreset = held._replace(keys=keys[held.indices], values=values[held.indices])
        return jnp.sum(jnp.sin(cj.attend(asked, coreset)))

    found = jax.grad(compressed, argnums=(0, 1))(keys, values)
    expected = jax.grad(gathered, argnums=(0, 1))(keys, values)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_rounded_numbers_have_the_derivatives_of_what_was_rounded():
    keys, values, asked = jax.random.normal(jax.random.key(0), (3, PAIRS, WIDTH))

    def loss(values, bits):
        compressor = (
            baselines.uniform()
            if bits is None
            else baselines.quantized(baselines.uniform(), bits=bits)
        )
        coreset = compressor(jax.random.key(1), keys, values, size=SIZE)
        # Linear in the values, so that rounding does not change the derivative.
        return jnp.sum(coreset.values * asked[:SIZE])

    np.testing.assert_array_equal(jax.grad(loss)(values, 2), jax.grad(loss)(values, None))


def test_padding_and_empty_slots_have_none():
    keys, values, asked = jax.random.normal(jax.random.key(0), (3, 2, PAIRS, WIDTH))
    lengths = jnp.array([PAIRS, 10])

    def loss(keys, values):
        coreset = refit.weights(cj.balanced())(
            jax.random.key(1), keys, values, size=SIZE, lengths=lengths
        )
        return jnp.sum(jnp.sin(cj.attend(asked, coreset)))

    found = jax.grad(loss, argnums=(0, 1))(keys, values)
    for each in found:
        assert jnp.all(jnp.isfinite(each))
        assert jnp.all(each[1, 10:] == 0)
        assert jnp.all(jnp.any(each[1, :10] != 0, axis=-1))
