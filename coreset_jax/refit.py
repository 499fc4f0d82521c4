r"""Refits: other weights, values or keys in place of those that a compressor kept.

They wrap any compressor and are compressors themselves:

    compressor = refit.move_keys(cj.pivoted())
    coreset = compressor(rng, keys, values, size=1024)

They keep every weight positive, so that a refitted coreset is read, streamed and decoded like any
other. Where a fit would not lessen the error that it is made for, the coreset stays as it was, and
the :class:`~coreset_jax.Info` counts a fallback. But for those that match attention, they need no
queries. All take these options:

- ``compressor``: what makes the coreset; any that returns positive weights;
- ``rho``, ``query_norm``, ``scale``: the radius of queries and the softmax scale, for it and for
  the fit, one number or one a head; ``None`` means those of ``compressor``;
- ``kernel_radius``: the kernel of the fit on unit keys; ``None`` for the one that measured best.

References:
  Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for fits behind kept keys.
  Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284, for
  fits to sample queries.
"""

from typing import Any

from jax.typing import ArrayLike

from coreset_jax._src import checks
from coreset_jax._src.core.compressor import Wrapper, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.core.turns import in_turns
from coreset_jax._src.fit import move_keys as moves
from coreset_jax._src.fit.matching import correct_to_queries, match_to_queries
from coreset_jax._src.fit.projection import project

__all__ = ["attention_matching", "matching", "move_keys", "nystrom", "weights"]

# Samples whose scores of the kept keys are held; how many there are is not known before a call.
_SAMPLES = 2048


class _Refit(Wrapper):
    """A compressor whose coresets are fitted to the head once more."""

    rho: ArrayLike | None = leaf(default=None)
    query_norm: ArrayLike | None = leaf(default=None)
    scale: ArrayLike | None = leaf(default=None)
    kernel_radius: Any = leaf(default=None)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` on bad options."""
        super().__post_init__()
        if self.compressor.signed:
            raise ValueError(
                "compressor must return positive weights to be refitted, and no normalizers; "
                f"got {self.compressor!r}."
            )

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        """Fitted pairs are no pairs of the source."""
        return False

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Compresses the head, and fits what comes of it."""
        coreset, info = self.compressor.on_head(head, size)

        def fit(self: _Refit, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
            return self.fit_head(head, coreset, info)

        workspace = self.workspace(head.count, size, head.width)
        return in_turns(fit, workspace, of_products=True)(self, head, coreset, info)

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        """The coreset after the fit; for subclasses to define."""
        raise NotImplementedError

    def workspace(self, count: int, size: int, width: int) -> int:
        """That of the compressor, or the matrices of the fit, whichever is more."""
        fit = moves.workspace(count, size)
        return max(self.compressor.workspace(count, size, width), fit)


class _Matching(_Refit):
    """A refit to sample queries."""

    @property
    def needs_queries(self) -> bool:  # type: ignore[override]
        """It is fitted to them."""
        return True

    def workspace(self, count: int, size: int, width: int) -> int:
        """That of the compressor, or the matrices of the fit, whichever is more."""
        fit = size * max(size, _SAMPLES) + _SAMPLES * min(count, _SAMPLES)
        return max(self.compressor.workspace(count, size, width), fit)


class nystrom(_Refit):  # noqa: N801
    r"""Refits weights and values behind the keys that a compressor keeps.

    .. math::
       [w'_s v'_s,\; w'_s] = [w_s v_s,\; w_s] +
         (E_{SS} + \lambda I)^{-1} \left( E_{SN} [V, 1] - E_{SS} [w_s v_s,\; w_s] \right)

    the projection of the whole cache onto the kept keys, in the kernel
    :math:`E_{kl} = e^{r\langle k,l\rangle}` of unit keys, for numerator and denominator. The ridge
    draws it to what the compressor had, and weights stay at least a tenth of what they were. Time
    is that of a pass of :math:`n m` kernel values and of one Cholesky factor a head; memory a few
    ``m x m`` matrices.

    Args:
      compressor: what picks the keys; they stay what they are, bit by bit.
      ridge: :math:`\lambda`, relative to the mean of the diagonal. A larger one stays nearer to
        what the compressor had.
      rho, query_norm, scale, kernel_radius: see :mod:`coreset_jax.refit`.

    Raises:
      ValueError: on bad options.

    References:
      Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for Nyström values behind kept keys.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> compressor = cj.refit.nystrom(cj.balanced())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> coreset.values.shape
    (64, 16)
    """

    ridge: float = 1e-2

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("ridge")

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        """Fits weights and values."""
        radius = self.kernel_radius
        return project(head, coreset, info, radius, ridge=self.ridge, fit_values=True)


class weights(_Refit):  # noqa: N801
    r"""Refits the weights alone: keys and values stay those of the source, bit by bit.

    .. math::
       w' = w + (G_{SS} + \lambda I)^{-1} (G_{SN} 1 - G_{SS} w), \qquad
       G_{kl} = e^{r\langle k,l\rangle} (\langle v_k, v_l\rangle + 1)

    with values in the units of the balance. Options and errors are those of :class:`nystrom`.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> compressor = cj.refit.weights(cj.baselines.uniform())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> bool((coreset.values == values[coreset.indices]).all())
    True
    """

    ridge: float = 1e-2

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("ridge")

    @property
    def keeps_pairs(self) -> bool:  # type: ignore[override]
        """Keys and values stay those of the compressor."""
        return self.compressor.keeps_pairs

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        """Fits the weights."""
        radius = self.kernel_radius
        return project(head, coreset, info, radius, ridge=self.ridge, fit_values=False)


class move_keys(_Refit):  # noqa: N801
    r"""Moves the keys that a compressor keeps, and refits weights and values behind them.

    Every step is one of Gauss and Newton in the keys, with a part of the step before it, and the
    best coefficients :math:`Y` behind where they arrive,

    .. math:: Y = (G_{SS} + \lambda I)^{-1} G_{SN}\, [V, 1], \qquad G_{kl} = e^{-\|k - l\|^2 / 2},

    where :math:`\lambda` is a few roundings of the largest eigenvalue. Weights stay positive, and
    heavy pairs among those kept (see :class:`coreset_jax.pivoted`) stay as they are. ``indices``
    say where a key came from.

    Time is that of ``2 * newton_steps + 1`` passes of ``n * m`` kernel values, or
    ``newton_steps + 1`` where these have no more than two million entries and are kept for the step
    behind a fit, and of ``newton_steps + 1`` Cholesky factors a head, and up to two more; memory a
    few ``m * m`` and ``2048 * m`` matrices, and two of ``n * m`` where they are kept.

    Args:
      compressor: what picks the keys to begin with; :class:`coreset_jax.pivoted` is the best start.
      newton_steps: how many; 0 leaves the keys where they are, but for those beyond the reach of
        the geometry, which are drawn in to it.
      rho, query_norm, scale, kernel_radius: see :mod:`coreset_jax.refit`.

    Raises:
      ValueError: on bad options.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 4, for the
      kernel; Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for fits behind keys that stay.

    >>> import jax, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 512, 16))
    >>> compressor = cj.refit.move_keys(cj.pivoted())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64)
    >>> bool((coreset.keys != keys[coreset.indices]).any())
    True
    """

    newton_steps: int = 3

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("newton_steps", 0)

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        """Moves the keys, and fits weights and values."""
        steps, radius = self.newton_steps, self.kernel_radius
        return moves.move_and_fit(head, coreset, info, radius, steps=steps)


class matching(_Matching):  # noqa: N801
    r"""Corrects weights and values so that sample queries get their exact attention.

    With the columns :math:`W = [w_s v_s,\; w_s]` of the coreset, values centered as in the geometry
    of the fit, the shares of its keys :math:`x_s` and the exact outputs of the samples,

    .. math::
       P_{qs} = \frac{e^{\mathrm{scale}\langle q, x_s\rangle}}
                     {\sum_i e^{\mathrm{scale}\langle q, k_i\rangle}}, \qquad
       y_q = \mathrm{Attn}(q),

    weights come first, and then the numerator that makes the right ratio with them,

    .. math::
       N = P^T P + \mathrm{strength} \cdot
           \frac{\mathrm{tr}\, P^T P}{\mathrm{tr}\, G}\, G, \qquad
       w' = w + N^{-1} P^T (1 - P w), \qquad
       [w'_s v'_s] = [w_s v_s] + N^{-1} P^T \bigl( (P w') \cdot y - P [w_s v_s] \bigr),

    with :math:`G_{st} = e^{-\|x_s - x_t\|^2 / 2}` the kernel of
    ``coreset_jax._src.geometry.kernel_geometry.fitting_geometry``: columns are multiplied by
    :math:`e^{\|x_s\|^2 / 2}`, the norms of the features, and shares divided by them.
    :math:`G` is the price of a change, in the kernel in which the coreset was fitted to the whole
    cache: what the samples say nothing of stays as it was. Before all this the weights are given
    the common factor that brings :math:`P w` nearest to one; attention does not see it.

    Weights stay positive: at least a tenth of the mean, or of what they were where that is less.
    The last eighth of the samples is not fitted to, and judges. Unless all this lessens the mean
    squared error of attention over them, and by a twentieth and a standard error the error in the
    geometric mean, the coreset is returned as it was; two samples or fewer change nothing.
    :attr:`coreset_jax.Info.matched` says which.

    Args:
      compressor: what makes the coreset. :class:`move_keys` and :class:`nystrom` leave what such a
        correction is made for.
      strength: how much :math:`G` counts beside the samples. A large one leaves the coreset as it
        was, and 0 cannot be.
      soft_cap: the cap of the samples' scores, see :func:`coreset_jax.attention`; ``None`` for
        none. Only this fit knows of it: the kernel has no cap.
      rho, query_norm, scale, kernel_radius: see :mod:`coreset_jax.refit`.

    It wants sample queries when called. Keys are the compressor's, bit by bit; values are not the
    source's any more, and the weights' mass is what the samples say. Time is that of ``q * n``
    scores and :math:`O((q + m) m^2)` a head; memory a few ``q * m`` and ``m * m`` matrices.

    Raises:
      ValueError: on bad options; when called, if ``queries`` are not given or empty.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284,
      for fits to sample queries; Schröder, Mackey, *WildCat*, 2026, arXiv 2602.10056, for the
      fit in the kernel that is corrected.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 512, 16))
    >>> compressor = cj.refit.matching(cj.refit.move_keys(cj.pivoted()))
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> coreset.keys.shape
    (64, 16)
    """

    strength: float = 1.0
    soft_cap: float | None = None

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("strength")
        object.__setattr__(self, "soft_cap", checks.static_float("soft_cap", self.soft_cap))

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        """Corrects weights and values by the samples."""
        radius, cap = self.kernel_radius, self.soft_cap
        return correct_to_queries(head, coreset, info, radius, strength=self.strength, soft_cap=cap)


class attention_matching(_Matching):  # noqa: N801
    r"""Fits weights and values to sample queries alone, behind the keys that a compressor keeps.

    It is :class:`coreset_jax.baselines.attention_matching` with other keys; see there for the
    formulas and the options. Where the fit does not lessen the mean squared error of attention over
    the samples, the coreset is returned as it was.

    The fit knows nothing of queries unlike the samples, and wants a few times as many of them as
    there are pairs kept. :func:`matching` does with fewer.

    Args:
      compressor: what makes the coreset; its keys are kept, bit by bit.
      ridge: regularization of the values, relative to the largest eigenvalue.
      bound: largest absolute log-weight.
      gradient_steps: gradient steps after the clip.
      rho, query_norm, scale: see :mod:`coreset_jax.refit`; ``kernel_radius`` is not used.

    It wants sample queries when called; values are not the source's any more, and weights need not
    sum to the length. In derivatives, the largest score of each sample, in the unit of which the
    fit is made, counts as constant.

    Raises:
      ValueError: on bad options; when called, if ``queries`` are not given or empty.

    References:
      Zweiger, Fu, Guo, Kim, *Fast KV Compaction via Attention Matching*, 2026, arXiv 2602.16284.

    >>> import jax, coreset_jax as cj
    >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 512, 16))
    >>> compressor = cj.refit.attention_matching(cj.baselines.uniform())
    >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
    >>> bool((coreset.keys == keys[coreset.indices]).all())
    True
    """

    ridge: float = 1e-5
    bound: float = 3.0
    gradient_steps: int = 2

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_float("ridge")
        self.static_float("bound")
        self.static_count("gradient_steps", 0)

    def fit_head(self, head: Head, coreset: Coreset, info: Info) -> tuple[Coreset, Info]:
        """Fits weights and values to the samples."""
        options = {"ridge": self.ridge, "bound": self.bound}
        return match_to_queries(head, coreset, info, gradient_steps=self.gradient_steps, **options)
