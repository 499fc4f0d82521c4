"""The cache whose budget is divided."""

import numpy as np
import pytest

LAYERS, HEADS, COUNT, WIDTH = 3, 4, 80, 8


@pytest.fixture(scope="module")
def cache():
    """Keys, values and queries of heads with ever more dimensions and ever sharper attention."""
    keys, queries = np.random.default_rng(0).standard_normal((2, LAYERS, HEADS, COUNT, WIDTH))
    keys *= np.arange(WIDTH) < np.array([1, 2, 4, 8])[:, None, None]
    values = np.tanh(keys + keys[..., ::-1])
    keys *= np.array([0.1, 1.0, 3.0, 6.0])[:, None, None]
    return tuple(array.astype(np.float32) for array in (keys, values, queries[..., :20, :]))
