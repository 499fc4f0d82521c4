"""A compressor that is quick to compile, and some that no stream can use."""

from typing import Any

import jax
import jax.numpy as jnp

import coreset_jax as cj
from coreset_jax._src.core.compressor import leaf


class sampled(cj.Compressor):  # noqa: N801
    """A sample in which early pairs are the likelier, the smaller ``skew``.

    ``note`` is called with the sample queries of every head.
    """

    skew: Any = leaf(default=1e3)
    note: Any = None

    @property
    def reads_queries(self):
        return self.note is not None

    def compress_head(self, head, size):
        if head.queries is not None:
            jax.debug.callback(self.note, head.queries)
        noise = self.skew * jax.random.uniform(head.key, head.count)
        order = jnp.argsort(jnp.where(head.inside, noise + jnp.linspace(0, 1, head.count), jnp.inf))
        places = jnp.sort(order[:size])
        places = jnp.where(places < head.length, places, -1)
        multiple = head.length / jnp.sum(places >= 0)
        return head.pairs(places, jnp.full(size, jnp.log(multiple), head.dtype)), cj.Info()


class looking(cj.Compressor):  # noqa: N801
    """The first pairs; ``note`` is called with the softmax scale of every head."""

    scale: Any = leaf(default=None)
    note: Any = None

    def compress_head(self, head, size):
        jax.debug.callback(self.note, head.scale)
        weights = jnp.full(size, jnp.log(head.length / size), head.dtype)
        return head.pairs(jnp.arange(size, dtype=jnp.int32), weights), cj.Info()


class signed(sampled):  # noqa: N801
    signed = True


class asking(sampled):  # noqa: N801
    needs_queries = True
