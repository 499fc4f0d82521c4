"""A model whose layers are one loop: fast to compile, and one program for a whole answer.

`decoding.step` calls a program a layer, which is what a few long pieces of text want. Token by
token its calls take longer than its arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

import coreset_jax as cj
from experiments.model.decoding import CoresetPrompt, FullCache, read_block

State = Any
"""Parameters as Flax splits them from a module."""


class StackedModel:
    """A model with the parameters of all blocks stacked, layer by layer.

    It holds the blocks' parameters once more.
    """

    def __init__(self, model: Any) -> None:
        """Stack the blocks of a model, which are all of one shape."""
        graphs, states = zip(*map(nnx.split, model.blocks), strict=True)
        if any(graph != graphs[0] for graph in graphs):
            raise ValueError("model must have blocks that are all alike")
        self._graph, self._outer_graph = graphs[0], nnx.graphdef(model)
        self._state = nnx.state(model)
        self._blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        attention = model.blocks[0].attention
        shape = getattr(attention, "config", attention)
        self.kv_heads, self.head_dim = shape.num_kv_heads, shape.head_dim

    def behind(self, coresets: cj.Coreset, length: int, room: int) -> CoresetPrompt:
        """The caches of all layers behind a document.

        Args:
          coresets: leading axes `[layers, kv_heads]`.
          length: tokens of the document.
          room: tokens that may follow.
        """
        layers = coresets.keys.shape[0]
        slots = jnp.zeros((layers, 1, self.kv_heads, room, self.head_dim))
        nothing = jnp.zeros((layers, 1), jnp.int32)
        return CoresetPrompt(
            jax.tree.map(lambda leaf: leaf[:, None], coresets),
            FullCache(slots, slots, nothing),
            nothing + length,
        )

    def read(
        self, caches: CoresetPrompt, tokens: Int[Array, " length"]
    ) -> tuple[Float[Array, "length vocabulary"], CoresetPrompt]:
        """Read tokens behind the caches; returns the logits of the token after each, and caches."""
        return _read(self._graph, self._outer_graph, self._blocks, self._state, caches, tokens)

    def continued(
        self, caches: CoresetPrompt, token: Array | int, most: int, end: int
    ) -> tuple[Int[Array, " most"], CoresetPrompt]:
        """Read a token and continue it greedily, in one program.

        Args:
          caches: with room for `most` tokens.
          token: the token that is read first.
          most: tokens of the answer, static.
          end: the token behind which nothing comes.

        Returns:
          The tokens that follow, and behind the last of them `end`; and the caches, which hold what
          was read: the first token and all that follow but the last.
        """
        return _continued(
            self._graph,
            self._outer_graph,
            most,
            self._blocks,
            self._state,
            caches,
            jnp.int32(token),
            jnp.int32(end),
        )


def _layers(
    graph: Any,
    outer_graph: Any,
    blocks: State,
    state: State,
    caches: CoresetPrompt,
    tokens: Int[Array, " length"],
) -> tuple[Float[Array, "length vocabulary"], CoresetPrompt]:
    model = nnx.merge(outer_graph, state)
    positions = caches.lengths[0][:, None] + jnp.arange(tokens.shape[0])
    x, positions = model.embed(tokens[None], positions, jnp.zeros((1, 2), jnp.int32))

    def layer(x: Array, parts: tuple[State, CoresetPrompt]) -> tuple[Array, Any]:
        state, cache = parts
        x, cache = read_block(nnx.merge(graph, state), cache, x, positions)
        # The coreset stays what it is, and is not handed through the loop.
        return x, cache[1:]

    x, (recent, lengths) = jax.lax.scan(layer, x, (blocks, caches))
    return model.logits(x)[0], CoresetPrompt(caches.coreset, recent, lengths)


_read = functools.partial(jax.jit, static_argnums=(0, 1))(_layers)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _continued(
    graph: Any,
    outer_graph: Any,
    most: int,
    blocks: State,
    state: State,
    caches: CoresetPrompt,
    token: Int[Array, ""],
    end: Int[Array, ""],
) -> tuple[Int[Array, " most"], CoresetPrompt]:
    Loop = tuple[Array, Array, Array, Any]  # noqa: N806

    def unfinished(loop: Loop) -> Array:
        count, token, _, _ = loop
        return (count < most) & (token != end)

    def extend(loop: Loop) -> Loop:
        count, token, said, (recent, lengths) = loop
        before = CoresetPrompt(caches.coreset, recent, lengths)
        logits, after = _layers(graph, outer_graph, blocks, state, before, token[None])
        token = jnp.argmax(logits[0]).astype(jnp.int32)
        return count + 1, token, said.at[count].set(token), (after.recent, after.lengths)

    start = (jnp.int32(0), token, jnp.full(most, end), (caches.recent, caches.lengths))
    _, _, said, (recent, lengths) = jax.lax.while_loop(unfinished, extend, start)
    return said, CoresetPrompt(caches.coreset, recent, lengths)
