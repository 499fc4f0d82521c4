"""How many units of a haystack fit a length."""

from collections.abc import Callable

# Steps along the line through the last two measurements, before bisection takes over.
_SECANT_STEPS = 8


def most_units(cost: Callable[[int], int], budget: int, least: int, most: int | None) -> int:
    """Returns a number of units that fits while one more does not.

    Costs are nearly proportional to units, so that a few measurements are enough.

    Args:
      cost: of a number of units; about monotone.
      budget: what the cost may be.
      least: the smallest number of units; it must fit.
      most: the largest number of units; returned if it fits.
    """
    low, low_cost = least, cost(least)
    high = None if most is None else most + 1
    guess = least + 8
    steps = 0
    while high is None or high - low > 1:
        if high is not None:
            guess = min(guess, high - 1)
            if steps > _SECANT_STEPS:
                guess = (low + high) // 2
        guess = max(guess, low + 1)
        guess_cost = cost(guess)
        rate = max((guess_cost - low_cost) / (guess - low), 1e-3)
        if guess_cost <= budget:
            low, low_cost = guess, guess_cost
        else:
            high = guess
        # At most tenfold: the first few units may cost nothing.
        guess = low + max(1, min(int((budget - low_cost) / rate), 9 * low + 64))
        steps += 1
    return low
