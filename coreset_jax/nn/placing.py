"""Caches on meshes: every device works on the sequences and heads that it has."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from coreset_jax._src import meshes

Result = TypeVar("Result")


def for_sequences(
    function: Callable[..., Result],
    *,
    like: Literal["cache", "pairs", "tokens"] = "cache",
    draws: bool = False,
) -> Callable[..., Result]:
    """A function of a cache and arrays, of which each device computes the part that it has.

    Arrays are ``[batch, length, heads, width]`` or ``[batch, ...]`` of any other rank. Under
    Explicit axes each device has the sequences and kv heads that their types say, and queries go
    where their key-value heads are. Elsewhere nothing is changed.

    Args:
      function: a pure function of a :class:`~coreset_jax.nn.CoresetCache`, which may be one without
        arrays, and of arrays or ``None``; the same on some of the sequences and kv heads.
      like: what its result is: a cache, ``[batch, kv_heads, ...]``, or like the first array.
      draws: whether it takes ``heads`` too, the numbers of the kv heads: random numbers are named
        after them, wherever a head is.
    """

    @functools.wraps(function)
    def call(cache: Any, *arrays: Array | None, heads: Array | None = None) -> Result:
        more = {}
        if draws:
            count = cache.recent.keys.shape[1]
            more["heads"] = jnp.arange(count, dtype=jnp.int32) if heads is None else heads
        mesh = meshes.explicit_mesh(cache, arrays)
        if mesh is None:
            return function(cache, *arrays, **more)
        held = jax.tree.leaves(cache.recent)
        tokens = [each for each in arrays if each is not None and each.ndim == 4]
        known = [jax.typeof(each).sharding.spec[:2] for each in held]
        known += [jax.typeof(each).sharding.spec[:3:2] for each in tokens]
        batch, head = meshes.first_names(known)
        # Fewer kv heads than devices: all of them everywhere.
        counts = [each.shape[1] for each in held] + [each.shape[2] for each in tokens]
        if min(counts) % meshes.parts(mesh, head):
            head = None
        row, pair = PartitionSpec(batch), PartitionSpec(batch, head)
        token = PartitionSpec(batch, None, head)
        caches = dataclasses.replace(
            cache, sinks=pair, middle=pair, recent=pair, filled=row, lengths=row, rng=row
        )
        if cache.prefix is not None:
            if head is not None:
                raise ValueError(
                    "a cache with a prefix must not be sharded over heads, which lie in one array "
                    "there; shard the batch."
                )
            shared = cache.prefix.lengths.shape[0] == 1
            documents = jax.tree.map(lambda _: PartitionSpec() if shared else row, cache.prefix)
            caches = dataclasses.replace(caches, prefix=documents)
        specs = [row if each is None or each.ndim != 4 else token for each in arrays]
        out_specs = {"cache": caches, "pairs": pair, "tokens": token}[like]

        def each_device(more: dict[str, Array], *arguments: Any) -> Result:
            return function(*arguments, **more)

        in_specs = PartitionSpec(head), caches, *specs
        mapped = meshes.on_each_device(each_device, mesh, in_specs, out_specs)
        found = mapped(more, cache, *arrays)
        if like != "tokens":
            return found
        # Queries may be on more devices than there are kv heads.
        placed: Result = meshes.placed(found, mesh, jax.typeof(arrays[0]).sharding.spec)
        return placed

    return call


def projected_sharding(heads: Array) -> NamedSharding | None:
    """How outputs of all heads ``[batch, length, features]`` lie, a sum over the heads.

    Under Explicit axes a sum over what is on several devices must say it; elsewhere ``None``.
    """
    mesh, spec = meshes.explicit_mesh(heads), jax.typeof(heads).sharding.spec
    if mesh is None or spec[-2] is None:
        return None
    return NamedSharding(mesh, PartitionSpec(*spec[:-2], None))
