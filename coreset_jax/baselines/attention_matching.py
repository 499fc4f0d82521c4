r"""Attention matching: weights and values fitted to what sample queries read from the cache.

Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284. What is
called "as published" here is the authors' code: its highest-attention keys and its fast settings.
"""

from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.fit.query_targets import evaluate, matched_log_weights, matched_values
from coreset_jax._src.queries import scores


class attention_matching(Compressor):  # noqa: N801
    r"""Attention matching on the highest-attention keys, in the authors' fast settings.

    With scores :math:`s_{qi} = \mathrm{scale}\langle q, k_i\rangle` of the sample queries,
    :math:`E_{qi} = e^{s_{qi} - \max_j s_{qj}}` and their exact outputs :math:`Y`, it keeps the
    :math:`m` keys of largest root mean square attention over the samples, weighs them so that they
    have the mass of all, and fits values to the outputs:

    .. math::
       B = \mathrm{clip}\bigl(\arg\min_B \|E_S B - E 1\|,\; e^{-\mathrm{bound}},
           e^{\mathrm{bound}}\bigr) \text{ and a few steps } B \leftarrow
           \mathrm{clip}\Bigl(B - \tfrac{1}{\sigma_{\max}^2} E_S^T(E_S B - E 1)\Bigr), \qquad
       \beta = \log B,

    .. math::
       X_{qi} = \mathrm{softmax}_{i \in S}(s_{qi} + \beta_i), \qquad
       C = \bigl(X^T X + \mathrm{ridge}\; \sigma_{\max}(X)^2 I\bigr)^{-1} X^T Y .

    The coreset has log-weights :math:`\beta` and values :math:`C`.

    It differs from the authors' code where that is arbitrary. They solve for :math:`B` with a
    solver that assumes full rank, whose answer is rounding where keys repeat; here a ridge of a
    thousand roundings gives copies equal shares. They start their power iteration at random; here
    it starts from ones, and nothing is drawn: ``rng`` is not used.

    The fit knows nothing of queries unlike the samples. With no more samples than pairs kept it
    interpolates, and the ridge is all that holds it. In float32 without ridge, copies would
    make values of :math:`10^8`; at the default it is as good as in float64.

    Args:
      ridge: regularization of the values, relative to the largest eigenvalue.
      bound: largest absolute log-weight.
      gradient_steps: gradient steps after the clip.
      scale: the softmax scale; ``None`` means ``1/sqrt(d)``.

    A compressor; see :class:`coreset_jax.Compressor`. It is query-informed. Keys are bit-identical
    to the source, values are not, and weights need not sum to the length.

    Raises:
      ValueError: on bad options.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284,
      and the authors' code, https://github.com/adamzweiger/compaction.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 4, 128, 16))
    >>> compressor = cj.baselines.attention_matching()
    >>> coreset = compressor(jax.random.key(1), keys, values, size=48, queries=queries)
    >>> coreset.keys.shape, coreset.log_weights.shape
    ((4, 48, 16), (4, 48))
    """

    ridge: float = 1e-5
    bound: float = 3.0
    gradient_steps: int = 2
    scale: ArrayLike | None = leaf(default=None)
    needs_queries: ClassVar[bool] = True
    keeps_pairs = False

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("ridge")
        self.static_float("bound")
        self.static_count("gradient_steps", 0)

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Keeps the keys of highest attention, and fits weights and values behind them."""
        assert head.queries is not None
        importance = scores.mean_squared_attention(head, head.queries)
        _, kept = jax.lax.top_k(jnp.where(head.inside, importance, -1), size)
        kept = jnp.sort(jnp.where(kept < head.length, kept, head.count)).astype(jnp.int32)
        coreset = head.pairs(kept, jnp.zeros((size,), head.dtype))
        targets = evaluate(head, coreset.keys, coreset.indices >= 0)
        masses = jnp.exp(targets.scores - targets.cache.maximum[:, None])
        log_weights = matched_log_weights(
            masses, targets.cache.total, bound=self.bound, gradient_steps=self.gradient_steps
        )
        shares = jax.nn.softmax(targets.scores + log_weights[None], axis=-1)
        outputs = head.standardization.restore_values(targets.outputs())
        values = matched_values(shares, outputs, ridge=self.ridge)
        # A head no longer than this is kept whole.
        whole = head.length <= size
        return coreset._replace(
            values=jnp.where(whole, coreset.values, values.astype(coreset.values.dtype)),
            log_weights=jnp.where(whole, coreset.log_weights, log_weights),
        ), Info()

    def workspace(self, count: int, size: int, width: int) -> int:
        """Attention weights of a block of samples, and the matrices of the fits."""
        return scores.workspace(count, width) + 4 * size * size
