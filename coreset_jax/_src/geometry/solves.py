"""Solves that do not fail: Gram matrices that may be singular, and LAPACK's routines in a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from coreset_jax._src.precision import matmul


def identity_like(matrix: Shaped[Array, "m m"]) -> Shaped[Array, "m m"]:
    """The identity, sharded as a matrix is: a solver wants both its arguments alike."""
    return jnp.zeros_like(matrix) + jnp.eye(matrix.shape[0], dtype=matrix.dtype)


def regularized_inverse(gram: Float[Array, "l l"], ridge: float) -> Float[Array, "l l"]:
    r"""The inverse :math:`(G + \lambda I)^{-1}` of a Gram matrix; see :func:`regularized_solve`."""
    return regularized_solve(gram, identity_like(gram), ridge)


def regularized_solve(
    gram: Float[Array, "l l"], right: Float[Array, "l c"], ridge: float
) -> Float[Array, "l c"]:
    r"""The solution :math:`(G + \lambda I)^{-1} R` for a Gram matrix that may be singular.

    Args:
      gram: a Gram matrix ``[l, l]``; its rows may repeat.
      right: :math:`R`, ``[l, c]``.
      ridge: :math:`\lambda` relative to the mean of the diagonal. Where rounding leaves the sum
        indefinite, it grows tenfold until it does not.

    Returns:
      The solution ``[l, c]``; NaN where the matrix is zero or not finite, or where no ridge up to
      the mean is enough.
    """
    return _with_ridge(ridge, gram, right)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_ridge(ridge: float, gram: Array, right: Array) -> tuple[Array, Array]:
    """The solution, and what was added to the diagonal."""
    eye = identity_like(gram)
    mean = jnp.mean(jnp.diagonal(gram))
    most = mean * max(ridge, 1.0)

    def fails(state: tuple[Array, Array]) -> Array:
        shift, solution = state
        # A matrix of zeros has no ridge to grow.
        return ~jnp.all(jnp.isfinite(solution)) & (shift <= most) & (shift > 0)

    def attempt(state: tuple[Array, Array]) -> tuple[Array, Array]:
        shift, _ = state
        return 10 * shift, solve_definite(gram + shift * eye, right)

    start = (ridge * mean, right + jnp.nan)
    shift, solution = jax.lax.while_loop(fails, attempt, start)
    return solution, shift / 10


def _forward(ridge: float, gram: Array, right: Array) -> Any:
    found = _with_ridge(ridge, gram, right)
    return found, (gram, *found)


def _backward(ridge: float, kept: Any, cotangents: Any) -> tuple[Array, Array]:
    del ridge
    gram, solution, shift = kept
    eye = identity_like(gram)
    adjoint = solve_definite(gram + shift * eye, cotangents[0])
    # The ridge is a multiple of the mean of the diagonal.
    through_ridge = jnp.sum(adjoint * solution) * shift / jnp.sum(jnp.diagonal(gram))
    return -matmul(adjoint, solution.T) - through_ridge * eye, adjoint


_with_ridge.defvjp(_forward, _backward)


def one_by_one(routine: Callable[..., Any]) -> Callable[..., Any]:
    """A routine of LAPACK's that on CPU takes the matrices of a batch one after another.

    Over a batch it would wait for the thread pool that it runs on. Where two do so at once, on
    several devices or as independent parts of one program, that is for ever.
    """

    def call(*arguments: Array) -> Any:
        sequential = jax.custom_batching.sequential_vmap(routine)
        return jax.lax.platform_dependent(*arguments, cpu=sequential, default=routine)

    def pull_back(arguments: tuple[Array, ...], cotangent: Any) -> tuple[Array, ...]:
        return jax.vjp(routine, *arguments)[1](cotangent)

    # A batching rule alone cannot be transposed.
    differentiable = jax.custom_vjp(call)
    differentiable.defvjp(
        lambda *arguments: (call(*arguments), arguments),
        lambda arguments, cotangent: one_by_one(pull_back)(arguments, cotangent),
    )
    return differentiable


def cholesky_factor(matrix: Float[Array, "m m"]) -> Float[Array, "m m"]:
    """The lower Cholesky factor of a symmetric matrix; NaN where it is not positive definite.

    Entries above the diagonal may be anything. The bare routine: what wrappers do beside it takes
    longer to compile. LAPACK reads matrices column by column, so that everything transposed goes to
    it and comes from it without a copy.
    """
    factor: Array = jax.lax.linalg.cholesky_p.bind(matrix.T)
    return factor


def solve_definite(matrix: Float[Array, "m m"], right: Float[Array, "m c"]) -> Float[Array, "m c"]:
    """The solution for a positive definite matrix by its Cholesky factor; NaN where it has none."""
    return one_by_one(lambda matrix, right: _substituted(cholesky_factor(matrix), right))(
        matrix, right
    )


def solve_factored(factor: Float[Array, "m m"], right: Float[Array, "m c"]) -> Float[Array, "m c"]:
    """The solution for a positive definite matrix of which the lower Cholesky factor is known."""
    return one_by_one(_substituted)(factor, right)


def _substituted(lower: Array, right: Array) -> Array:
    solved = jax.lax.linalg.triangular_solve(lower, right.T, lower=True, transpose_a=True)
    return jax.lax.linalg.triangular_solve(lower, solved, lower=True).T
