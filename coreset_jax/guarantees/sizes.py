r"""How many pairs a coreset takes, from above and from below: the paper's theorems as functions.

Everything is for the unit problem of :func:`coreset_jax.geometry.standardize`: keys and values of
norm at most one, queries of norm at most :math:`\rho`, softmax scale 1. The functions take and
return Python numbers, so that a size may go straight into a compressor.

*Nearly Optimal Attention Coresets* (Liberty, Andoni, Kleiner, 2026) leaves its constants open. The
one of the upper bound is fitted here to what :func:`coreset_jax.balanced` was measured to do; those
of the lower bounds are worked out from the proofs.
"""

import math
import typing
from typing import Literal

from coreset_jax._src import checks
from coreset_jax.guarantees.checks import positive_number

Choice = Literal["blind", "equal", "weighted"]
"""What the choice of a coreset may use, see :func:`decoding_bound`."""

# Fitted to the balanced coresets of
#     python -m experiments.sweep --config=configs/sweep.py --config.methods="('balanced',)"
# (unit sphere, n = 16384, sizes 256 to 4096, d = 16 to 64, rho = 1 to 4): the largest of
# error * size / (2 D), 0.078 at d = 16, rho = 1, size 4096, rounded up, so that the theorem with it
# holds for what was measured. At d = 32 the errors 0.0147, 0.0042, 0.0012 at sizes 256, 1024, 4096
# for rho = 1 have 0.052, 0.060, 0.068, and 0.0307, 0.0091, 0.0030 for rho = 2 have 0.030, 0.036,
# 0.047. Spheres need less and less of it as d and rho grow: 0.011 at d = 64, rho = 4.
DISCREPANCY_CONSTANT = 0.08

# The lower bounds, with numbers in place of the proofs' small constants. Signal of a bit: 1.
# A coreset's error may have this norm, in signals, divided by the root of the width,
_ERROR_PER_SIGNAL = 0.09
# and so many codewords, in units of e^(2 rho), make a noise of deviation 0.045 at most.
_CODEWORDS_PER_SQUARE = 1 / 500
# A bit is misread if the error exceeds 0.35, on at most (0.09 / 0.35)^2 = 6.62 % of them, or the
# noise 0.15, with probability exp(-0.15^2 * 500 / 2) = 0.36 % (Hoeffding): 7 % together.
# To read the rest takes this share of the pairs (decoding_bound, any weights), or of the bits
# (1 - h(0.07)).
_SHARE_OF_PAIRS = 0.0517
_SHARE_OF_BITS = 0.634


def _check(width: int, rho: float, **positive: float) -> None:
    checks.check_count("width", width)
    for name, value in {"rho": rho, **positive}.items():
        positive_number(name, value)


def discrepancy(width: int, rho: float, *, constant: float = DISCREPANCY_CONSTANT) -> float:
    r"""The imbalance that signs can always be brought down to: Theorems 3 and 5.

    .. math::
       \min_x \sup_{\|q\| \le \rho} \Big\| \sum_i x_i e^{\langle q, k_i\rangle} v_i \Big\|
         \;\le\; D(d, \rho) = c \, \sqrt d \; e^{\rho} \, (8 \pi \rho)^{1/4} \sqrt{\log(\rho + 2)}

    whatever the number of pairs. The last two factors are a reading of the paper's
    :math:`e^{\rho + o(\rho)}`: Taylor degree j contributes
    :math:`\sqrt{d \log(j + 2)}\, \rho^j / (j! \, \alpha_j)` with the Poisson weights
    :math:`\alpha_j^2 = e^{-\rho} \rho^j / j!`, and
    :math:`\sum_j \alpha_j \approx (8 \pi \rho)^{1/4}`.

    Args:
      width: width of the keys and of the values, the larger of the two.
      rho: radius of the queries.
      constant: c. The paper has some universal constant; the default is fitted by experiment, see
        ``DISCREPANCY_CONSTANT`` (``python -m experiments.sweep --config=configs/sweep.py``).

    Raises:
      ValueError: if ``width`` is not a positive integer, or ``rho`` or ``constant`` not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Sections 4 and 5.

    >>> print(round(discrepancy(32, 1.0), 2))
    2.89
    """
    _check(width, rho, constant=constant)
    degrees = (8 * math.pi * rho) ** 0.25 * math.sqrt(math.log(rho + 2))
    return constant * math.sqrt(width) * math.exp(rho) * degrees


def reachable_error(
    width: int, rho: float, size: int, *, constant: float = DISCREPANCY_CONSTANT
) -> float:
    r"""The error that a coreset of a given size need not exceed: Theorem 4 read backwards.

    .. math::
       \varepsilon = \frac{2 D(d, \rho)}{m} \;\ge\; \sum_{t \ge 0} \frac{D(d, \rho)}{2^t m}

    A halving that leaves :math:`m'` pairs moves numerator and denominator by D each, over a
    denominator of :math:`2 m'` or hardly less: an error of :math:`D / m'`, a geometric series over
    the levels.

    Args:
      width: width of the keys and of the values, the larger of the two.
      rho: radius of the queries.
      size: pairs kept.
      constant: that of :func:`discrepancy`; the default is fitted by experiment.

    Returns:
      The largest error over the ball of queries, where values have norm at most 1. Nothing is
      said where it comes near 1.

    Raises:
      ValueError: if ``width`` or ``size`` is not a positive integer, or another not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 4.

    >>> print(round(reachable_error(32, 1.0, 1024), 4))
    0.0056
    """
    checks.check_size(size)
    return 2 * discrepancy(width, rho, constant=constant) / size


def sufficient_size(
    width: int, rho: float, eps: float, *, constant: float = DISCREPANCY_CONSTANT
) -> int:
    r"""The size at which a coreset of a given error exists: Theorem 4.

    .. math:: m = O\!\left(\sqrt d \, e^{\rho + o(\rho)} / \varepsilon\right)
                = \lceil 2 D(d, \rho) / \varepsilon \rceil

    Args:
      width: width of the keys and of the values, the larger of the two.
      rho: radius of the queries.
      eps: the largest error allowed, where values have norm at most 1.
      constant: that of :func:`discrepancy`; the default is fitted by experiment, to what the
        library's own compressor needed.

    Returns:
      The size, whatever the number of pairs that it is taken from.

    Raises:
      ValueError: if ``width`` is not a positive integer, or another argument not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 4.

    >>> sufficient_size(32, 1.0, 0.01)
    578
    """
    _check(width, rho, eps=eps)
    return math.ceil(2 * discrepancy(width, rho, constant=constant) / eps)


def _codewords(rho: float, relative: float) -> int:
    r"""Keys of an instance whose bits survive an error of ``relative`` times the value of a bit.

    The signal of a bit is :math:`e^\rho / (e^\rho + N)` of its value.
    """
    by_error = math.exp(rho) * (_ERROR_PER_SIGNAL / relative - 1)
    by_noise = math.exp(2 * rho) * _CODEWORDS_PER_SQUARE
    return max(0, math.floor(min(by_error, by_noise)))


def necessary_size(width: int, rho: float, eps: float) -> int:
    r"""The size that no weighted subset of a given error can go below: Theorem 7.

    .. math:: m = \Omega\!\left(\sqrt d \, e^{\rho} / \varepsilon\right)

    There are N codewords that answer for d bits each, in :math:`n = N d` pairs
    (:func:`coreset_jax.guarantees.hard_instances.coreset_instance`). A coreset with error at
    most :math:`\varepsilon` at every query shows 93 % of the bits, and hence holds 0.0517 of the
    pairs, whatever their weights (:func:`decoding_bound`). Refitted values are outside of it.

    .. math::
       m \ge 0.0517 \, N d, \qquad
       N = \left\lfloor \min\!\left( e^{\rho} \Big(\frac{0.09}{\varepsilon \sqrt d} - 1\Big),\;
           \frac{e^{2\rho}}{500} \right) \right\rfloor

    which is :math:`0.0046 \sqrt d\, e^\rho / \varepsilon` between :math:`45\, e^{-\rho}` and 0.09,
    well inside, of :math:`\varepsilon \sqrt d`. Nothing is fitted: the numbers are those of the
    proof, and they are modest. Below :math:`\rho = 3.1` they leave no codeword. Keys are taken to
    be wide enough for orthogonal codewords; a width of :math:`O(\rho^2 \log N)` costs a constant.

    Args:
      width: width of the values.
      rho: radius of the queries.
      eps: the largest error allowed, where values have norm at most 1.

    Returns:
      The size; 1 where the theorem says nothing.

    Raises:
      ValueError: if ``width`` is not a positive integer, or another argument not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 7.

    >>> necessary_size(64, 8.0, 0.002)
    45616
    """
    _check(width, rho, eps=eps)
    codewords = _codewords(rho, eps * math.sqrt(width))
    return max(1, math.ceil(_SHARE_OF_PAIRS * width * codewords))


def necessary_bits(width: int, rho: float, eps: float) -> int:
    r"""The bits that no sketch of a given error can do without, of whatever kind: Theorem 6.

    .. math:: \Omega\!\left(d \, \min(e^{2 \rho},\; e^{\rho} / \varepsilon)\right)

    N pairs carry d bits each in their values
    (:func:`coreset_jax.guarantees.hard_instances.sketch_instance`). An error of at most
    :math:`\varepsilon` at every query shows 93 % of them, and
    :math:`1 - h(0.07) = 0.634` bits each is what that takes:

    .. math::
       0.634 \, N d, \qquad
       N = \left\lfloor \min\!\left( e^{\rho} \Big(\frac{0.09}{\varepsilon} - 1\Big),\;
           \frac{e^{2\rho}}{500} \right) \right\rfloor

    Nothing is fitted: the numbers are those of the proof, as in :func:`necessary_size`.

    Args:
      width: width of the values.
      rho: radius of the queries.
      eps: the largest error allowed, where values have norm at most 1.

    Returns:
      The bits; 0 where the theorem says nothing.

    Raises:
      ValueError: if ``width`` is not a positive integer, or another argument not positive.

    References:
      Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Theorem 6.

    >>> necessary_bits(64, 8.0, 0.001)
    721117
    """
    _check(width, rho, eps=eps)
    return math.ceil(_SHARE_OF_BITS * width * _codewords(rho, eps))


def binary_entropy(probability: float) -> float:
    r"""The entropy of a bit in bits, :math:`h(p) = -p \log_2 p - (1 - p) \log_2 (1 - p)`.

    >>> binary_entropy(0.5)
    1.0
    """
    parts = probability, 1 - probability
    return -sum(part * math.log2(part) for part in parts if part > 0)


def _inverse_binary_entropy(entropy: float) -> float:
    """The probability up to one half with this entropy, from below."""
    low, high = 0.0, 0.5
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binary_entropy(middle) <= entropy else (low, middle)
    return low


def _log2_choices(count: int, most: int) -> float:
    r"""A bound on the logarithm of :math:`\sum_{k \le m} \binom n k`."""
    return count * binary_entropy(min(most / count, 0.5))


def decoding_bound(
    pairs: int,
    size: int,
    *,
    bits_per_pair: int = 1,
    choice: Choice = "weighted",
) -> float:
    r"""The share of random bits that can at best be read from a coreset of the pairs they are in.

    n pairs hold b independent fair bits each; everything else about them is public. Whoever reads
    the coreset, a set S of at most m pairs, knows the bits of S, and of the other bits what the
    choice of S and of its weights says. Let K be the logarithm of the number of such choices, and
    p the share of bits read, in expectation over bits and all randomness:

    .. math::
       p \le \frac mn + \Big(1 - \frac mn\Big) p', \qquad 1 - h(p') = \frac{K}{(n - m)\, b}

    *Proof.* Of bits and coreset, one determines the other together with the :math:`(n - |S|) b`
    bits left out, so that these have an entropy of at least :math:`(n - |S|) b - K` given the
    coreset, in expectation. By Fano's inequality it is at most the sum of :math:`h(e)` over them,
    e the probability that a bit is misread, and by concavity at most :math:`(n - |S|) b \, h(e')`
    with the mean :math:`e'`. What is misread falls as :math:`|S|` grows to m.

    What K is depends on what the choice may use:

    - ``"blind"``: S and the weights do not depend on the bits, as in uniform sampling: K = 0.
    - ``"equal"``: S may, and the weights are equal, or follow from S:
      :math:`K = \log_2 \sum_{k \le m} \binom nk \le n\, h(m / n)`.
    - ``"weighted"``: S and real weights may. Numbers without end could say anything, but not to a
      decoder that thresholds attention outputs: each bit is then the sign of an affine function of
      the m weights (numerator minus threshold times denominator), and n b hyperplanes cut their
      space into at most :math:`\sum_{k \le m} \binom{n b}k` cells, all that can be told apart. That
      logarithm adds to K. It covers weights in numerator and denominator, or in one of them.

    No bound covers new values, such as those of a refit.

    Args:
      pairs: n.
      size: m.
      bits_per_pair: b.
      choice: what the choice of the coreset may use.

    Raises:
      ValueError: if a count is not a positive integer or ``choice`` not one of the three.

    References:
      Fano's inequality and the counting of cells are textbook matter; the reduction from Index is
      that of Liberty, Andoni, Kleiner, *Nearly Optimal Attention Coresets*, 2026, Section 6.

    >>> for choice in ("blind", "equal", "weighted"):
    ...     print(round(decoding_bound(1024, 64, bits_per_pair=32, choice=choice), 3))
    0.531
    0.59
    0.631
    """
    checks.check_count("pairs", pairs)
    checks.check_size(size)
    checks.check_count("bits_per_pair", bits_per_pair)
    if choice not in typing.get_args(Choice):
        raise ValueError(f"choice must be one of {typing.get_args(Choice)}, got {choice!r}.")
    if size >= pairs:
        return 1.0
    told = 0.0
    if choice != "blind":
        told += _log2_choices(pairs, size)
    if choice == "weighted":
        told += _log2_choices(pairs * bits_per_pair, size)
    left_out = (pairs - size) * bits_per_pair
    misread = _inverse_binary_entropy(max(0.0, 1 - told / left_out))
    return 1 - misread * left_out / (pairs * bits_per_pair)
