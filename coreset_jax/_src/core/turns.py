"""How many heads, or chunks of them, a stage works on at a time: one budget of memory for all."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from coreset_jax._src import meshes

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
    one loop, with as many heads at a time as the memory budget allows; on a mesh each device goes
    through those that it has.

    Args:
      function: a pure function of pytrees of arrays, without tracers in its closure.
      workspace: numbers that its intermediate results take.
      of_products: whether most of its work is large matrix products: those of one head keep a CPU
        busy, which goes through heads one by one then.
    """
    if of_products and jax.default_backend() == "cpu":
        workspace = memory_budget()
    # Traced once, whatever the number of axes.
    traced = jax.jit(function)

    def call(*arguments: Any) -> Result:
        leaves, tree = jax.tree.flatten(arguments)
        smooth = [_is_smooth(leaf) for leaf in leaves]

        def on_leaves(numbers: list[Array], others: list[Array]) -> Result:
            return _over(traced, (), workspace)(
                *jax.tree.unflatten(tree, _merged(smooth, numbers, others))
            )

        def pull_back(numbers: list[Array], others: list[Array], cotangents: Any) -> list[Array]:
            def smooth_results(*numbers: Array) -> list[Array]:
                found = function(*jax.tree.unflatten(tree, _merged(smooth, numbers, others)))
                return [leaf for leaf in jax.tree.leaves(found) if _is_smooth(leaf)]

            _, transposed = jax.vjp(smooth_results, *numbers)
            return list(transposed(cotangents))

        def backward(given: Any, cotangents: Any) -> tuple[list[Array], None]:
            wanted = [leaf for leaf in jax.tree.leaves(cotangents) if _is_smooth(leaf)]
            # Cotangents take as much again, and so do results that are kept for them.
            return in_turns(pull_back, 4 * workspace)(*given, wanted), None

        # A batching rule alone cannot be transposed. Going back, heads are worked through in turns
        # as well, each of them once more from the start.
        differentiable = jax.custom_vjp(on_leaves)
        differentiable.defvjp(lambda *given: (on_leaves(*given), given), backward)
        numbers, others = (
            [leaf for leaf, is_one in zip(leaves, smooth, strict=True) if is_one is each]
            for each in (True, False)
        )
        return differentiable(numbers, others)

    return call


def _is_smooth(leaf: Any) -> bool:
    """Whether results may have a derivative along this array, or it may have one."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _merged(
    smooth: Sequence[bool], numbers: Iterable[Array], others: Iterable[Array]
) -> list[Array]:
    """Leaves in their order again."""
    numbers, others = iter(numbers), iter(others)
    return [next(numbers) if each else next(others) for each in smooth]


class _Axis(NamedTuple):
    """An axis that a function is vmapped over: its length, and the leaves of arguments with it."""

    length: int
    leaves: Any


def _over(
    function: Callable[..., Result], axes: tuple[_Axis, ...], workspace: int
) -> Callable[..., Result]:
    @jax.custom_batching.custom_vmap
    def call(*arguments: Any) -> Result:
        return _loop(function, axes, workspace, arguments)

    @call.def_vmap
    def _(length: int, batched: Any, *arguments: Any) -> Any:
        axis = _Axis(length, tuple(batched))
        found = _over(function, (axis, *axes), workspace)(*arguments)
        return found, jax.tree.map(lambda _: True, found)

    return call


def _loop(
    function: Callable[..., Result], axes: tuple[_Axis, ...], workspace: int, arguments: Any
) -> Result:
    if not axes:
        return function(*arguments)
    leaves, tree = jax.tree.flatten(arguments)
    has_axes = list(zip(*(jax.tree.leaves(axis.leaves) for axis in axes), strict=True))

    def heads(*leaves: Array) -> Result:
        return _heads_in_turns(function, leaves, tree, has_axes, workspace)

    return meshes.cut_by_heads(heads, leaves, has_axes)


def _heads_in_turns(
    function: Callable[..., Result],
    leaves: Sequence[Array],
    tree: Any,
    has_axes: Sequence[tuple[bool, ...]],
    workspace: int,
) -> Result:
    """What a function of one head returns for all of them.

    Args:
      function: the function.
      leaves: those of its arguments, each behind those of the axes that it has.
      tree: the structure of its arguments.
      has_axes: for each leaf, which axes it has.
      workspace: numbers that intermediate results of one head take.
    """
    leading = meshes.leading_shape(leaves, has_axes)
    total = math.prod(leading)
    most = max(memory_budget() // max(workspace, 1), 1)
    if total <= most:
        for axis in reversed(range(len(leading))):
            in_axes = [0 if has[axis] else None for has in has_axes]
            function = jax.vmap(function, in_axes=jax.tree.unflatten(tree, in_axes))
        return function(*jax.tree.unflatten(tree, leaves))
    # A divisor: the function is compiled once, and not for what is left over as well.
    at_once = max(each for each in range(1, most + 1) if total % each == 0)
    shape = (total,) if at_once == 1 else (total // at_once, at_once)
    several = function if at_once == 1 else jax.vmap(function)

    def folded(leaf: Array, has_axis: tuple[bool, ...]) -> Array:
        own = jnp.shape(leaf)[sum(has_axis) :]
        missing = [place for place, has_it in enumerate(has_axis) if not has_it]
        spread = jnp.broadcast_to(jnp.expand_dims(leaf, missing), (*leading, *own))
        return spread.reshape(*shape, *own)

    given = jax.tree.unflatten(tree, map(folded, leaves, has_axes))
    found = jax.lax.map(lambda each: several(*each), given)
    return jax.tree.map(lambda leaf: leaf.reshape(*leading, *leaf.shape[len(shape) :]), found)
