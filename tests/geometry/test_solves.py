"""Solves of singular matrices, and of many at once."""

import jax
import jax.numpy as jnp
import numpy as np

from coreset_jax import walks
from coreset_jax._src.geometry import solves
from coreset_jax.guarantees import candidates


def test_regularized_inverse_of_singular_matrices():
    """Of (G + lambda I) for some lambda from the ridge on: never NaN, whatever repeats."""
    inverses = {
        ridge: jax.jit(lambda gram, ridge=ridge: solves.regularized_inverse(gram, ridge))
        for ridge in (1e-12, 1e-4, 2.0)
    }
    for rank in (1, 3, 40):
        rows = np.random.default_rng(rank).standard_normal((rank, 40))
        rows = np.repeat(rows, -(-200 // rank), axis=0)[:200]
        gram = rows @ rows.T / 40
        # On the complement of the rows the inverse is 1 / lambda.
        complement = np.linalg.svd(rows)[0][:, rank:]
        for ridge, invert in inverses.items():
            inverse = np.asarray(invert(jnp.asarray(gram, jnp.float32)))
            assert np.all(np.isfinite(inverse))
            smallest = np.diagonal(complement.T @ inverse @ complement).mean()
            assert 1 / (smallest * np.mean(np.diagonal(gram))) > 0.5 * ridge


def test_regularized_inverse_says_what_it_cannot_do():
    invert = jax.jit(lambda gram: solves.regularized_inverse(gram, 1e-4))
    assert np.all(np.isnan(invert(jnp.zeros((3, 3)))))
    assert np.any(np.isnan(invert(jnp.full((3, 3), jnp.nan))))


def test_lapack_takes_no_batches():
    """Batches of two independent calls would wait for each other for ever on two cores."""
    width, rng = 6, jax.random.key(0)

    def all_of_them(gram):
        return (
            solves.regularized_solve(gram, gram, 1e-3),
            walks.gram_schmidt(rng, gram, gram[0], jnp.int32(width)),
            solves.one_by_one(candidates._right_singular_vectors)(gram),
        )

    batch = jnp.zeros((5, width, width))
    text = jax.jit(jax.vmap(all_of_them)).lower(batch).compile().as_text()
    found = [line for line in text.splitlines() if 'custom_call_target="lapack_' in line]
    for routine in ("potrf", "trsm", "gesdd"):
        assert any(routine in line for line in found), routine
    for line in found:
        assert "[5," not in line
