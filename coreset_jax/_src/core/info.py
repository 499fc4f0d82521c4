"""What happened in a compression, beside what came of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Info(NamedTuple):
    r"""What happened to each head; ``None`` where a method has no such thing.

    Errors in the kernel are squared norms, so that those of parts add up; their squared norm of
    reference is ``kernel_energy``.

    Attributes:
      rho: radius of the unit queries, :math:`\mathrm{scale}\,\max\|k - \bar k\|\,\max\|q\|`,
        ``[...]``, with keys that are far wider in some channels than in others brought to the
        width of these.
      kernel_radius: radius of the kernel in which pairs were told apart, on unit keys, ``[...]``;
        the largest of a head's parts.
      heavy: pairs kept because their weight alone outweighs a slot, int32 ``[...]``.
      rounds: rounds of a selection: draws of pivots, or halvings, int32 ``[...]``.
      fits: fits that were made, one a part and stage, int32 ``[...]``.
      fallbacks: fits that would not have made the error smaller and were left out, int32 ``[...]``.
      kernel_energy: squared norm of the pairs that were fitted, in the kernel, ``[...]``.
      kernel_error_before: squared error before the last fit in the kernel, ``[...]``.
      kernel_error_after: and after it, ``[...]``; no larger.
      matched: fits to sample queries that were taken, since queries that they had not seen are
        answered better with them, int32 ``[...]``; one for each 2048 slots at most.
      sample_error_before: root mean squared error of attention before sample queries were matched,
        over those of them that were held back, in the units of the values, ``[...]``; the largest
        of a head's parts.
      sample_error_after: and after it, ``[...]``; no larger.
    """

    rho: Float[Array, "*heads"] | None = None
    kernel_radius: Float[Array, "*heads"] | None = None
    heavy: Int[Array, "*heads"] | None = None
    rounds: Int[Array, "*heads"] | None = None
    fits: Int[Array, "*heads"] | None = None
    fallbacks: Int[Array, "*heads"] | None = None
    kernel_energy: Float[Array, "*heads"] | None = None
    kernel_error_before: Float[Array, "*heads"] | None = None
    kernel_error_after: Float[Array, "*heads"] | None = None
    matched: Int[Array, "*heads"] | None = None
    sample_error_before: Float[Array, "*heads"] | None = None
    sample_error_after: Float[Array, "*heads"] | None = None

    @property
    def accepted(self) -> Bool[Array, "*heads"] | None:
        """Whether no fit of a head fell back to what it was to improve."""
        return None if self.fallbacks is None else self.fallbacks == 0

    def of_parts(self) -> "Info":
        """The information of a head from that of its parts, along the first axis."""
        summed = {
            "heavy",
            "fits",
            "fallbacks",
            "matched",
            "kernel_energy",
            "kernel_error_before",
            "kernel_error_after",
        }
        gathered = {
            name: jnp.sum(each, axis=0) if name in summed else jnp.max(each, axis=0)
            for name, each in self._asdict().items()
            if each is not None
        }
        return Info(**gathered)

    def with_fit(self, better: Bool[Array, ""], **fields: Array) -> "Info":
        """The information after one more fit, which was taken if it was better."""
        one = jnp.ones_like(better, jnp.int32)
        fits = one if self.fits is None else self.fits + one
        fallbacks = (~better).astype(jnp.int32) + (0 if self.fallbacks is None else self.fallbacks)
        return self._replace(fits=fits, fallbacks=fallbacks, **fields)
