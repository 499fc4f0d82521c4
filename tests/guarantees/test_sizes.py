"""The theorems as functions: against measured errors, each other, the proofs and brute force."""

import itertools
import math

import numpy as np
import pytest

from coreset_jax.guarantees import sizes

# What `python -m experiments.sweep --config=configs/sweep.py` measures: (d, rho, size): error.
SWEEP = {
    (32, 1.0, 256): 0.0147,
    (32, 1.0, 1024): 0.0042,
    (32, 1.0, 4096): 0.0012,
    (32, 2.0, 256): 0.0307,
    (32, 2.0, 1024): 0.0091,
    (32, 2.0, 4096): 0.0030,
    (16, 1.0, 256): 0.0118,
    (16, 1.0, 4096): 0.00097,
    (16, 4.0, 4096): 0.0120,
    (64, 1.0, 4096): 0.0015,
    (64, 4.0, 256): 0.158,
    (64, 4.0, 4096): 0.0100,
}


def test_measured_coresets_keep_to_the_upper_bound_and_one_comes_close():
    shares = [error / sizes.reachable_error(*cell) for cell, error in SWEEP.items()]
    assert max(shares) <= 1
    assert max(shares) > 0.95
    assert min(shares) > 0.1


def test_size_and_error_are_inverse():
    for width, rho, eps in itertools.product((1, 64), (0.1, 1.0, 7.0), (0.5, 1e-4)):
        size = sizes.sufficient_size(width, rho, eps)
        assert sizes.reachable_error(width, rho, size) <= eps
        if size > 1:
            assert sizes.reachable_error(width, rho, size - 1) > eps


def test_discrepancy_adds_up_the_degrees_of_the_proof():
    # sum_j rho^j / (j! alpha_j) with the Poisson weights alpha_j^2 = e^-rho rho^j / j!.
    for rho in (1.0, 2.0, 4.0, 16.0):
        degrees = np.arange(200)
        log_factorials = np.array([math.lgamma(degree + 1) for degree in degrees])
        log_alphas = (degrees * math.log(rho) - log_factorials - rho) / 2
        total = np.sum(np.exp(degrees * math.log(rho) - log_factorials - log_alphas))
        ratio = sizes.discrepancy(9, rho, constant=1.0) / (3 * math.sqrt(math.log(rho + 2)) * total)
        assert ratio == pytest.approx(1, abs=0.2 / rho)


def test_necessary_is_never_more_than_sufficient():
    for width, rho, eps in itertools.product(
        (1, 8, 128, 4096), (0.5, 3.0, 6.0, 12.0), (0.3, 1e-2, 1e-3, 1e-5, 1e-8)
    ):
        necessary = sizes.necessary_size(width, rho, eps)
        assert 1 <= necessary <= sizes.sufficient_size(width, rho, eps)
        assert sizes.necessary_bits(width, rho, eps) >= 0


def test_lower_bounds_have_the_rates_of_the_theorems():
    # Well inside the range where neither noise nor the query's own codeword limits the instance.
    small, rho, eps = sizes.necessary_size(64, 12.0, 1e-4), 12.0, 1e-4
    assert sizes.necessary_size(64, rho, eps / 2) == pytest.approx(2 * small, rel=0.02)
    assert sizes.necessary_size(256, rho, eps) == pytest.approx(2 * small, rel=0.02)
    assert small == pytest.approx(0.00465 * math.sqrt(64) * math.exp(rho) / eps, rel=0.02)
    bits = sizes.necessary_bits(64, rho, 1e-3)
    assert sizes.necessary_bits(128, rho, 1e-3) == pytest.approx(2 * bits, rel=0.02)
    assert sizes.necessary_bits(64, rho, 2e-3) == pytest.approx(bits / 2, rel=0.02)
    # Beyond it, error no longer counts, and the radius does twice.
    small, bits = sizes.necessary_size(64, 5.0, 1e-9), sizes.necessary_bits(64, 5.0, 1e-9)
    assert sizes.necessary_size(64, 5.0, 1e-12) == small
    assert sizes.necessary_bits(64, 7.0, 1e-12) == pytest.approx(math.exp(4) * bits, rel=0.05)


def test_constants_of_the_lower_bounds_follow_from_the_decoding_bound():
    misread = (0.09 / 0.35) ** 2 + math.exp(-(0.15**2) * 500 / 2)
    assert misread < 0.07
    pairs = 10**6
    # With a share of 0.0517 of the pairs even the best choice and weights do not show 93 % of the
    # bits.
    assert sizes.decoding_bound(pairs, 51_700, choice="weighted") < 0.93
    assert 1 - sizes.binary_entropy(0.07) > 0.634


def best_success(pairs, size, bits_per_pair, choices):
    """The best success of all deterministic strategies, by trying them one after another."""
    bits = list(itertools.product((0, 1), repeat=pairs * bits_per_pair))
    subsets = list(itertools.combinations(range(pairs), size))

    def message(which, subset):
        kept = np.reshape(which, (pairs, bits_per_pair))[list(subset)]
        return subset, tuple(kept.ravel())

    best = 0.0
    for chosen in choices(len(bits), subsets):
        told = {}
        for which, subset in zip(bits, chosen, strict=True):
            told.setdefault(message(which, subset), []).append(which)
        # The best reader takes the majority of what a message may mean, bit by bit.
        right = sum(
            np.sum(np.maximum(np.sum(group, axis=0), len(group) - np.sum(group, axis=0)))
            for group in map(np.array, told.values())
        )
        best = max(best, right / (len(bits) * pairs * bits_per_pair))
    return best


def test_no_strategy_exceeds_the_decoding_bound():
    # All 3^8 ways in which the one pair kept of three may depend on three bits.
    def informed(inputs, subsets):
        return itertools.product(subsets, repeat=inputs)

    def blind(inputs, subsets):
        return ((subset,) * inputs for subset in subsets)

    best = best_success(3, 1, 1, informed)
    assert 2 / 3 < best <= sizes.decoding_bound(3, 1, choice="equal")
    best = best_success(2, 1, 1, informed)
    assert best <= sizes.decoding_bound(2, 1, choice="equal")
    for pairs, size, bits in ((3, 1, 1), (3, 2, 1), (2, 1, 3)):
        exact = best_success(pairs, size, bits, blind)
        bound = sizes.decoding_bound(pairs, size, bits_per_pair=bits, choice="blind")
        assert exact == pytest.approx(bound)


def test_no_weights_show_more_sign_patterns_than_are_counted():
    # Bits read are signs of affine functions of the weights: n b of them, in dimension m.
    rng = np.random.default_rng(0)
    for count, dimension in ((6, 1), (6, 2), (10, 2)):
        normals, offsets = rng.normal(size=(count, dimension)), rng.normal(size=count)
        points = rng.standard_cauchy((50_000, dimension)) * 2
        patterns = len(np.unique(points @ normals.T > offsets, axis=0))
        cells = sum(math.comb(count, k) for k in range(dimension + 1))
        assert patterns <= cells
        assert math.log2(cells) <= sizes._log2_choices(count, dimension) + 1e-9


def test_decoding_bounds_are_ordered_and_rise_to_one():
    for bits in (1, 64):
        curves = [
            [
                sizes.decoding_bound(96, size, bits_per_pair=bits, choice=choice)
                for size in range(1, 97)
            ]
            for choice in ("blind", "equal", "weighted")
        ]
        assert np.all(np.diff(curves, axis=0) >= 0)
        assert np.all(np.diff(curves, axis=1) >= 0)
        assert np.all(np.asarray(curves)[:, -1] == 1)
        assert np.all(np.asarray(curves)[:, 0] < 0.75)


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (sizes.discrepancy, (0, 1.0), "width"),
        (sizes.discrepancy, (4, -1.0), "rho"),
        (sizes.reachable_error, (4, 1.0, 0), "size"),
        (sizes.sufficient_size, (4, 1.0, 0.0), "eps"),
        (sizes.sufficient_size, (4, math.inf, 0.1), "rho"),
        (sizes.necessary_size, (4.5, 1.0, 0.1), "width"),
        (sizes.necessary_size, (4, 1.0, None), "eps"),
        (sizes.necessary_bits, (4, 1.0, math.nan), "eps"),
        (sizes.decoding_bound, (0, 1), "pairs"),
        (sizes.decoding_bound, (4, 0), "size"),
    ],
)
def test_bad_input_is_refused(function, arguments, named):
    with pytest.raises(ValueError, match=named):
        function(*arguments)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="choice"):
        sizes.decoding_bound(4, 2, choice="random")
    with pytest.raises(ValueError, match="bits_per_pair"):
        sizes.decoding_bound(4, 2, bits_per_pair=0)
    with pytest.raises(ValueError, match="constant"):
        sizes.discrepancy(4, 1.0, constant=0.0)
