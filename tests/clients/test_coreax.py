"""Kernel thinning by coreax, a coreset library in JAX, beside a balance of the same pairs."""

import jax
import jax.numpy as jnp
import numpy as np
from coreax import Data, SquaredExponentialKernel
from coreax.solvers import KernelThinning

from benchmarks.thinning import points_and_bandwidth
from tests.clients import thinning

COUNT, SIZE = 1024, 128


def test_balanced_is_better():
    keys, values, queries = thinning.cache(COUNT)
    points, bandwidth = points_and_bandwidth(keys, values)
    kernel = SquaredExponentialKernel(length_scale=float(np.sqrt(bandwidth / 2)))
    errors = []
    for seed in range(2):
        solver = KernelThinning(
            coreset_size=SIZE,
            random_key=jax.random.key(seed),
            kernel=kernel,
            sqrt_kernel=kernel,
            delta=0.5,
        )
        thinned, _ = solver.reduce(Data(jnp.asarray(points, jnp.float32)))
        kept = np.asarray(thinned.unweighted_indices)
        assert len(kept) == SIZE
        errors.append(thinning.error_of_pairs(kept, keys, values, queries))
    assert thinning.error_of_balanced(keys, values, queries, SIZE) <= np.mean(errors)
