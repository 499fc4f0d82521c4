"""KeyDiff: keys that point where most others do are evicted."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coreset_jax.attention import accumulation_dtype
from coreset_jax.baselines.scores import Head, keep_largest
from coreset_jax.coreset import Compressor


@dataclasses.dataclass(frozen=True)
class _Dissimilarity:
    def __call__(self, head: Head, *, size: int, block_size: int) -> Float[Array, " n"]:
        del size, block_size
        dtype = accumulation_dtype(head.keys)
        # Padding may hold anything, and the sum must not see it.
        keys = jnp.where(head.inside[:, None], head.keys.astype(dtype), 0)
        norms = jnp.linalg.norm(keys, axis=-1, keepdims=True)
        directions = keys / jnp.maximum(norms, jnp.finfo(dtype).tiny)
        # The length of the anchor changes no order, so the sum does for the mean.
        anchor = jnp.sum(directions, axis=0)
        return -jnp.matmul(directions, anchor, precision=jax.lax.Precision.HIGHEST)


def key_similarity() -> Compressor:
    r"""Evicts the keys that are most similar to the mean direction of all keys (KeyDiff).

    .. math::
       \mathrm{score}_i = -\cos\Bigl(k_i,\; \frac1n \sum_l \frac{k_l}{\|k_l\|}\Bigr),
       \qquad w_i = 1

    Keys that stand apart have high attention scores in trained models, the paper observes. The
    method as it shrinks a cache that is complete, in one step, and without the paper's optional
    window of recent pairs.

    Returns:
      A :class:`~coreset_jax.coreset.Compressor` ``(rng, keys [..., n, d], values [..., n, dv], *,
      size, lengths=None, queries=None) -> Coreset``. It is query-free (``queries`` are ignored)
      and draws nothing. Log-weights are 0, float32 or wider. A head no longer than ``size`` is
      kept whole, and ``size >= n`` returns the cache itself. The call raises ``ValueError`` if
      shapes do not fit, if ``size`` is not a positive integer or if ``lengths`` lie outside
      ``1..n``.

    References:
      Park et al., *KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference
      in Resource-Constrained Environments*, 2025, arXiv 2504.15364, Section 3.

    >>> import jax, jax.numpy as jnp, coreset_jax as cj
    >>> keys = jnp.array([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [1.0, 0.2]])
    >>> coreset = cj.baselines.key_similarity()(jax.random.key(0), keys, keys, size=1)
    >>> print(coreset.indices)
    [2]
    """
    return keep_largest(_Dissimilarity(), groups=None)
