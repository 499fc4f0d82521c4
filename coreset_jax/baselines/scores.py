"""What methods share that give every pair a score and keep the pairs of largest score.

Kept pairs have weight one: what is dropped is dropped with its mass, as was published.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info
from coreset_jax._src.queries import scores


class KeepLargest(Compressor):
    """Keeps the pairs of largest score, each with weight one; of equal ones, the first."""

    def score(self, head: Head, size: int) -> Float[Array, " n"]:
        """The score of every pair of a head; what it says of padding is not looked at."""
        raise NotImplementedError

    def compress_head(self, head: Head, size: int) -> tuple[Coreset, Info]:
        """Keeps the pairs of largest score."""
        found = self.score(head, size)
        sound = ~jnp.any(head.inside & jnp.isnan(found))
        coreset = head.largest(found, size)
        return coreset._replace(log_weights=jnp.where(sound, coreset.log_weights, jnp.nan)), Info()


class KeepAttended(KeepLargest):
    """Keeps the pairs of largest score by sample queries, of one or several query heads."""

    scale: ArrayLike | None = leaf(default=None)
    groups: int = 1
    needs_queries: ClassVar[bool] = True

    def validate(self) -> None:
        """Raises ``ValueError`` on bad static options."""
        self.static_count("groups")

    def check_call(self, keys: Any, size: int, queries: Any) -> None:
        """Raises ``ValueError`` unless all query heads have as many samples."""
        super().check_call(keys, size, queries)
        if queries is not None and queries.shape[-2] % self.groups:
            raise ValueError(
                f"queries must hold as many samples (axis -2) for each of {self.groups} groups; "
                f"got queries {queries.shape} and keys {keys.shape}."
            )

    def grouped(self, head: Head) -> Float[Array, "groups q d"]:
        """The samples of each query head."""
        assert head.queries is not None
        return head.queries.reshape(self.groups, -1, head.queries.shape[-1])

    def workspace(self, count: int, size: int, width: int) -> int:
        """Attention weights of a block of samples, and the keys in the dtype of sums."""
        del size
        return scores.workspace(count, width)
