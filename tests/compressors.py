"""Compressors that are quick to compile, and what else tests of many methods share."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from coreset_jax._src.core.compressor import Compressor, leaf
from coreset_jax._src.core.head import Head
from coreset_jax._src.core.info import Info


class sampled(Compressor):  # noqa: N801
    """A uniform sample of the valid pairs, all of one weight."""

    def compress_head(self, head, size):
        noise = jnp.where(head.inside, jax.random.uniform(head.key, head.count), jnp.inf)
        places = jnp.sort(jnp.argsort(noise)[:size])
        places = jnp.sort(jnp.where(places < head.length, places, head.count))
        weight = jnp.log(head.length / jnp.minimum(size, head.length))
        return head.pairs(places, jnp.full(size, weight, head.dtype)), Info()


class scaled(sampled):  # noqa: N801
    """The same with a softmax scale, one number or one a head."""

    scale: Any = leaf(default=None)


class newest(Compressor):  # noqa: N801
    """The last pairs, with weight one."""

    def compress_head(self, head, size):
        places = jnp.maximum(head.length - size, 0) + jnp.arange(size, dtype=jnp.int32)
        places = jnp.where(places < head.length, places, head.count)
        return head.pairs(places, jnp.zeros(size, head.dtype)), Info()


class asking(newest):  # noqa: N801
    """The pairs nearest to a head's first sample query."""

    needs_queries = True

    def compress_head(self, head, size):
        scores = jnp.where(head.inside, head.keys @ head.queries[0], -jnp.inf)
        places = jnp.sort(jnp.argsort(-scores)[:size])
        return head.pairs(places, jnp.zeros(size, head.dtype)), Info()


class signed(sampled):  # noqa: N801
    """One that claims to return signed coresets."""

    signed = True


@functools.partial(jax.jit, static_argnames="measured")
def refit(compressor, keys, values, coreset, queries=None, lengths=None, *, measured=True):
    """What a refit makes of some coreset of heads ``[h, n, d]``, and what happened."""

    def one_head(keys, values, coreset, queries, length):
        head = Head.prepare(
            jax.random.key(0),
            jnp.int32(0),
            keys,
            values,
            jnp.int32(keys.shape[0]) if length is None else length,
            queries,
            ragged=length is not None,
            measured=measured,
            **compressor.query_ball._asdict(),
        )
        return compressor.fit_head(head, coreset, Info())

    return jax.vmap(one_head)(keys, values, coreset, queries, lengths)


def heads_of(*trees):
    """Trees of arrays with a leading axis, one head after another."""
    count = len(jax.tree.leaves(trees)[0])
    for head in range(count):
        yield jax.tree.map(lambda leaf, head=head: leaf[head], trees)
