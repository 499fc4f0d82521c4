"""Arrays on meshes of devices: every device works on the heads that it has.

Heads do not know of each other. So a device needs nothing of another one, as long as each head is
on one device as a whole, and a program of many devices is that of one on fewer heads:

- Under Explicit axes the types of arrays say which heads a device has. Functions go through
  ``jax.shard_map`` (:func:`on_each_device`), and see them alone.
- Under Auto axes only the compiler knows. It finds its way through what is done with all heads
  at once, but not through loops over them: it would gather all heads on every device. Such a loop
  is handed to it as one operation that it may cut along heads (:func:`cut_by_heads`).

Inside ``jax.shard_map`` axes are Manual, and none of this happens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from coreset_jax._src.checks import is_traced

Result = TypeVar("Result")

# What an axis of an array is cut by: an axis of a mesh, several, or nothing.
Name = str | tuple[str, ...] | None


def explicit_mesh(*trees: Any) -> Mesh | AbstractMesh | None:
    """The mesh of Explicit axes on which some of these arrays lie, or ``None``."""
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, jax.Array):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.size > 1 and AxisType.Explicit in mesh.axis_types:
                # With its devices where it has some: outside of jit they are needed.
                return mesh if is_traced(leaf) else cast(NamedSharding, leaf.sharding).mesh
    return None


def _each(*names: Name) -> list[str]:
    """The axes of a mesh in some names."""
    flat: list[str] = []
    for name in names:
        flat += [] if name is None else [name] if isinstance(name, str) else list(name)
    return flat


def placed(tree: Any, mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> Any:
    """Arrays cut by the same names, wherever they were; for meshes of Explicit axes."""

    def place(leaf: Any) -> Array:
        leaf = jnp.asarray(leaf)
        whole = PartitionSpec(*spec, *[None] * (leaf.ndim - len(spec)))
        known, wanted = jax.typeof(leaf).sharding, NamedSharding(mesh, whole)
        if known.mesh == mesh.abstract_mesh and known.spec == whole:
            return leaf
        if is_traced(leaf) or isinstance(mesh, AbstractMesh):
            return jax.sharding.reshard(leaf, wanted)
        return jax.device_put(leaf, wanted)

    return jax.tree.map(place, tree)


def on_each_device(
    function: Callable[..., Result],
    mesh: Mesh | AbstractMesh,
    in_specs: Sequence[Any],
    out_specs: Any,
) -> Callable[..., Result]:
    """A function of whole arrays, of which each device computes the part that it has.

    Args:
      function: a pure function of arrays that is the same on parts of them.
      mesh: a mesh of Explicit axes.
      in_specs: a ``PartitionSpec`` for the arrays of each argument, or a tree of them.
      out_specs: that of the results.
    """
    explicit = {
        name
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Explicit
    }
    # All, without a name: those that are vmapped over stay out.
    chosen = set() if len(explicit) == len(mesh.axis_names) else explicit
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(in_specs),
        out_specs=out_specs,
        axis_names=chosen,
        # A head is on several devices where it is not cut by all axes, and the same on each.
        check_vma=False,
    )

    def call(*arguments: Any) -> Result:
        given = []
        for argument, specs in zip(arguments, in_specs, strict=True):
            whole = jax.tree.broadcast(specs, argument, is_leaf=_is_spec)
            given.append(jax.tree.map(lambda leaf, spec: placed(leaf, mesh, spec), argument, whole))
        return mapped(*given)

    return call


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def for_heads(
    function: Callable[..., Result],
    axes: int,
    shared: Any,
    *of_heads: Any,
    together: Sequence[int] = (),
) -> Result:
    """What a function of all heads returns; under Explicit axes each device has heads of its own.

    Args:
      function: a pure function of what follows that is the same on some of the heads, which are in
        front of all its results.
      axes: how many leading axes of heads there are.
      shared: arrays that are the same for all heads.
      *of_heads: trees of arrays with these leading axes; a single number is for all heads.
      together: leading axes along which heads do know of each other: every device has them all.
    """
    mesh = explicit_mesh(of_heads)
    if mesh is None:
        return function(shared, *of_heads)
    names = head_names(of_heads, axes)
    local = PartitionSpec(*(None if axis in together else name for axis, name in enumerate(names)))

    def specs(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: local if jnp.ndim(leaf) else PartitionSpec(), tree)

    in_specs = PartitionSpec(), *map(specs, of_heads)
    results = on_each_device(function, mesh, in_specs, local)(shared, *of_heads)
    return placed(results, mesh, PartitionSpec(*names)) if together else results


def head_names(tree: Any, axes: int) -> tuple[Name, ...]:
    """What the leading axes of arrays are cut by, as their types say; the first decides."""
    specs = [jax.typeof(leaf).sharding.spec[:axes] for leaf in jax.tree.leaves(tree)]
    return _shared_names(specs, [[True] * axes] * len(specs))


def alike(axes: int, *trees: Any) -> tuple[Any, ...]:
    """Arrays as they are; under Explicit axes cut along their leading axes by the same names.

    What their other axes are cut by stays.
    """
    mesh = explicit_mesh(trees)
    if mesh is None:
        return trees
    names = head_names(trees, axes)

    def place(leaf: Array) -> Array:
        rest = jax.typeof(leaf).sharding.spec[axes:]
        kept = [None if set(_each(name)) & set(_each(*names)) else name for name in rest]
        return placed(leaf, mesh, PartitionSpec(*names, *kept))

    return jax.tree.map(place, trees)


def gathered(axis: int, tree: Any) -> Any:
    """Arrays that have all along one of their axes on every device; for Explicit axes alone."""
    mesh = explicit_mesh(tree)
    if mesh is None:
        return tree

    def gather(leaf: Any) -> Any:
        names = list(jax.typeof(leaf).sharding.spec)
        if len(names) <= axis or names[axis] is None:
            return leaf
        names[axis] = None
        return placed(leaf, mesh, PartitionSpec(*names))

    return jax.tree.map(gather, tree)


def leading_shape(leaves: Sequence[Array], has_axes: Sequence[Sequence[bool]]) -> tuple[int, ...]:
    """The lengths of the leading axes of arrays, each of which has some of them."""
    lengths = [0] * len(has_axes[0])
    for leaf, has in zip(leaves, has_axes, strict=True):
        held = [axis for axis, has_it in enumerate(has) if has_it]
        for axis, length in zip(held, leaf.shape, strict=False):
            lengths[axis] = length
    return tuple(lengths)


def cut_by_heads(
    function: Callable[..., Result], leaves: Sequence[Array], has_axes: Sequence[Sequence[bool]]
) -> Result:
    """What a function of all heads returns, as one operation that the compiler may cut by heads.

    Args:
      function: a pure function of arrays that is the same on some of the heads. All leading axes
        are in front of its results.
      leaves: its arguments.
      has_axes: for each which of the leading axes it has; they come first.
    """
    if _on_auto_mesh(leaves):
        return _cut_by_the_compiler(function, leaves, has_axes)
    return function(*leaves)


def _on_auto_mesh(leaves: Sequence[Array]) -> bool:
    """Whether arrays lie, or may lie, on a mesh of which only the compiler knows how it cuts."""
    known = [jax.typeof(leaf).sharding.mesh for leaf in leaves]
    for mesh in (*known, jax.sharding.get_abstract_mesh()):
        if mesh.size > 1:
            return all(kind == AxisType.Auto for kind in mesh.axis_types)
    return False


def first_names(specs: Sequence[Sequence[Name]]) -> tuple[Name, ...]:
    """What axes are cut by that several arrays have; of those that disagree the first decides."""
    return _shared_names(specs, [[True] * len(spec) for spec in specs])


def parts(mesh: Mesh | AbstractMesh, name: Name) -> int:
    """How many parts an axis is cut into by a name."""
    return math.prod(mesh.shape[each] for each in _each(name))


def _shared_names(
    specs: Sequence[Sequence[Name]], has_axes: Sequence[Sequence[bool]]
) -> tuple[Name, ...]:
    """What leading axes are cut by; of arrays that disagree the first decides."""
    names: list[Name] = [None] * len(has_axes[0])
    for spec, has in zip(specs, has_axes, strict=True):
        held = [axis for axis, has_it in enumerate(has) if has_it]
        for axis, name in zip(held, spec, strict=False):
            if names[axis] is None and not set(_each(name)) & set(_each(*names)):
                names[axis] = name
    return tuple(names)


def _spec(names: Sequence[Name], has: Sequence[bool]) -> PartitionSpec:
    """How an array with some of the leading axes is cut."""
    return PartitionSpec(*(name for name, has_it in zip(names, has, strict=True) if has_it))


def _cut_by_the_compiler(
    function: Callable[..., Result], leaves: Sequence[Array], has_axes: Sequence[Sequence[bool]]
) -> Result:
    """What a function of all heads returns, as one operation that may be cut along heads alone."""
    shapes, tree = jax.tree.flatten(jax.eval_shape(function, *leaves))
    everything = [True] * len(has_axes[0])
    impls = [
        jax.random.key_impl(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else None
        for leaf in leaves
    ]

    def flat(*plain: Array) -> tuple[Array, ...]:
        given = []
        for array, leaf, impl in zip(plain, leaves, impls, strict=True):
            array = array if leaf.ndim or impl is not None else array[0]
            given.append(array if impl is None else jax.random.wrap_key_data(array, impl=impl))
        return tuple(jax.tree.leaves(function(*given)))

    # Random keys as what they are made of, and numbers as rows: those have a place for a factor.
    plain = [
        jnp.atleast_1d(leaf) if impl is None else jax.random.key_data(leaf)
        for leaf, impl in zip(leaves, impls, strict=True)
    ]

    def partition(mesh: Any, given: Sequence[Any], wanted: Sequence[Any]) -> tuple[Any, ...]:
        has_all = [*has_axes, *[everything] * len(wanted)]
        specs = [each.sharding.spec for each in (*given, *wanted)]
        names = _shared_names(specs, has_all)
        cuts = [NamedSharding(mesh, _spec(names, has)) for has in has_all]
        return mesh, flat, tuple(cuts[len(given) :]), tuple(cuts[: len(given)])

    own: list[str] = []

    def factors(has: Sequence[bool], rank: int) -> str:
        """A factor for each axis of an array: its leading ones are those of all arrays."""
        led = [f"head{axis}" for axis, has_it in enumerate(has) if has_it]
        more = [f"own{len(own) + place}" for place in range(rank - len(led))]
        own.extend(more)
        return " ".join([*led, *more])

    operands = [factors(has, each.ndim) for has, each in zip(has_axes, plain, strict=True)]
    results = [factors(everything, each.ndim) for each in shapes]
    operation = custom_partitioning(flat)
    rule = f"{', '.join(operands)} -> {', '.join(results)}"
    operation.def_partition(partition, sharding_rule=rule)
    return jax.tree.unflatten(tree, operation(*plain))
