"""Coresets that were made for scores without a cap answer for capped ones."""

import pytest

from benchmarks import soft_cap


@pytest.mark.slow
@pytest.mark.parametrize("name", ["balanced", "fitted", "fitted, sample queries"])
def test_under_a_cap_errors_are_no_larger(name):
    """A cap flattens attention, and flat attention is what few pairs answer best."""
    plain, capped = soft_cap.errors(name, soft_cap.case(512, 25.0), 64)
    assert 0 < capped <= plain


@pytest.mark.slow
def test_fits_to_samples_that_know_of_the_cap_err_less_under_it():
    case = soft_cap.case(512, 50.0)
    ignorant, knowing = (
        soft_cap.errors(f"fitted, sample queries{option}", case, 64)
        for option in ("", ", soft_cap")
    )
    assert knowing.capped < 0.5 * ignorant.capped
    assert knowing.plain > ignorant.plain
