"""The softmax scale of a coreset: carried since its compression, given by its reader, or both."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from coreset_jax._src import checks

# Scales that differ by less are the same one, rounded.
_ROUNDING = 1e-5


def differ(first: ArrayLike | None, second: ArrayLike | None) -> bool:
    """Whether two softmax scales are known to differ; ``None`` and traced ones are not."""
    if first is None or second is None or not (checks.is_known(first) and checks.is_known(second)):
        return False
    first, second = (np.asarray(each, np.float64) for each in (first, second))
    if first.ndim and second.ndim and first.shape != second.shape:
        return True
    return not np.allclose(first, second, rtol=_ROUNDING, atol=0)


def _shown(scale: ArrayLike | None) -> str:
    """A scale as text, as one number if it is the same for all heads."""
    several = np.unique(np.asarray(scale, np.float64))
    return f"{several[0]:g}" if several.size == 1 else f"{scale}"


def shared_scale(name: str, first: ArrayLike | None, second: ArrayLike | None) -> ArrayLike | None:
    """The one softmax scale of two things that go together, of which either may have none.

    Raises ``ValueError`` with that ``name`` if each has one, and they are known to differ.
    """
    if differ(first, second):
        raise ValueError(
            f"{name} must have one softmax scale, got {_shown(first)} and {_shown(second)}."
        )
    return second if first is None else first


def reading_scale(
    carried: ArrayLike | None, given: ArrayLike | None, leading: tuple[int, ...]
) -> ArrayLike | None:
    """The softmax scale to read a coreset with; ``None`` means ``1/sqrt(d)``.

    Args:
      carried: the coreset's own.
      given: the reader's.
      leading: leading axes of the coreset.

    Returns:
      The scale that is there. Where both are and cannot be compared yet, the reader's, and NaN in
      heads in which they will differ.

    Raises:
      ValueError: if one is not positive or has other axes, or both are known to differ.
    """
    checks.check_positive("scale", given, leading)
    if carried is None:
        return given
    checks.check_positive("scale of the coreset", carried, leading)
    if given is None:
        return carried
    if differ(carried, given):
        raise ValueError(
            f"scale must be that which the coreset was made for, {_shown(carried)}; "
            f"got {_shown(given)}."
        )
    if checks.is_known(carried) and checks.is_known(given):
        return given
    carried, given = jnp.asarray(carried), jnp.asarray(given)
    alike = jnp.abs(given - carried) <= _ROUNDING * jnp.abs(carried)
    return jnp.where(alike, given, jnp.nan)
