"""KeyDiff: keys that point where most others do are evicted."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax._src.core.head import Head
from coreset_jax._src.precision import matmul
from coreset_jax.baselines.scores import KeepLargest


class keydiff(KeepLargest):  # noqa: N801
    r"""Evicts the keys that are most similar to the mean direction of all keys (KeyDiff).

    .. math::
       \mathrm{score}_i = -\cos\Bigl(k_i,\; \frac1n \sum_l \frac{k_l}{\|k_l\|}\Bigr),
       \qquad w_i = 1

    Keys that stand apart have high attention scores in trained models, the paper observes. The
    method as it shrinks a cache that is complete, in one step, and without the paper's optional
    window of recent pairs.

    A compressor; see :class:`coreset_jax.Compressor`. It looks at no query and draws nothing.

    References:
      Park et al., *KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference
      in Resource-Constrained Environments*, 2025, arXiv 2504.15364, Section 3.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [1.0, 0.2]])
    >>> coreset = cj.baselines.keydiff()(jax.random.key(0), keys, keys, size=1)
    >>> print(coreset.indices)
    [2]
    """

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """How little a key has of the mean direction of all."""
        del size
        keys = head.keys.astype(head.dtype)
        norms = jnp.linalg.norm(keys, axis=-1, keepdims=True)
        directions = keys / jnp.maximum(norms, jnp.finfo(head.dtype).tiny)
        # The length of the anchor changes no order, so the sum does for the mean.
        return -matmul(directions, jnp.sum(directions, axis=0))
