"""How many heads, or chunks of them, a stage works on at a time: one budget of memory for all."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Result = TypeVar("Result")

# Numbers that the intermediate results of a stage may take, by platform.
_BUDGETS = {"cpu": 2**24}
_ACCELERATOR_BUDGET = 2**29


def memory_budget() -> int:
    """Numbers that the intermediate results of all heads worked on at a time may take."""
    return _BUDGETS.get(jax.default_backend(), _ACCELERATOR_BUDGET)


def over_axes(function: Callable[..., Result], axes: int) -> Callable[..., Result]:
    """A function of one head as one of arrays with that many leading axes, all heads at once."""
    for _ in range(axes):
        function = jax.vmap(function)
    return function


def in_turns(
    function: Callable[..., Result], workspace: int, *, of_products: bool = False
) -> Callable[..., Result]:
    """A function of one head that goes through many in turns, wherever it is vmapped.

    All axes over which it is vmapped, of heads, chunks and chunks of chunks, are gone through by
    one loop, with as many heads at a time as the memory budget allows.

    Args:
      function: a pure function of pytrees of arrays, without tracers in its closure.
      workspace: numbers that its intermediate results take.
      of_products: whether most of its work is large matrix products: those of one head keep a CPU
        busy, which goes through heads one by one then.
    """
    if of_products and jax.default_backend() == "cpu":
        workspace = memory_budget()
    # Traced once, whatever the number of axes.
    return _over(jax.jit(function), (), workspace)


def _over(
    function: Callable[..., Result], leading: tuple[int, ...], workspace: int
) -> Callable[..., Result]:
    @jax.custom_batching.custom_vmap
    def call(*arguments: Any) -> Result:
        return _loop(function, leading, workspace, arguments)

    @call.def_vmap
    def _(size: int, batched: Any, *arguments: Any) -> Any:
        def spread(leaf: Any, has_axis: bool) -> Any:
            return leaf if has_axis else jnp.broadcast_to(leaf, (size, *jnp.shape(leaf)))

        arguments = jax.tree.map(spread, arguments, tuple(batched))
        found = _over(function, (size, *leading), workspace)(*arguments)
        return found, jax.tree.map(lambda _: True, found)

    return call


def _loop(
    function: Callable[..., Result], leading: tuple[int, ...], workspace: int, arguments: Any
) -> Result:
    total, axes = math.prod(leading), len(leading)
    most = max(memory_budget() // max(workspace, 1), 1)
    if total <= most:
        return over_axes(function, axes)(*arguments)
    # A divisor: the function is compiled once, and not for what is left over as well.
    at_once = max(each for each in range(1, most + 1) if total % each == 0)
    shape = (total,) if at_once == 1 else (total // at_once, at_once)
    several = function if at_once == 1 else jax.vmap(function)
    folded = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[axes:]), arguments)
    found = jax.lax.map(lambda each: several(*each), folded)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[len(shape) :]), found)
