"""Shapes and dtypes of annotations, checked in every call that tests make, traced or not.

The import hook of jaxtyping asks for a type checker, by its name; this one is Beartype, with two
exceptions. Arrays of NumPy count as arrays of JAX. And functions that users call check their own
arguments: they must have done so, with an error that says more, before annotations are looked at.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from beartype import beartype

# Of the modules behind the public ones, what users call.
PUBLIC = {
    "Compressor.__call__",
    "Compressor.with_info",
    "compress",
    "attend",
    "attention",
    "calibrate",
    "gather",
    "standardize",
}

# A test has a field of its own.
UNCHECKED = {"halve.<locals>.step"}


def _as_jax(value: Any) -> Any:
    return jnp.asarray(value) if isinstance(value, np.ndarray) else value


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does nothing but look at its arguments, and at the result that is among them.

    Jaxtyping makes two of every function: one that is called before it, for which any result will
    do, and one that is called behind it.
    """
    name = function.__qualname__
    before = inspect.signature(function).return_annotation is Any
    inner = function.__module__.startswith("coreset_jax._src.")
    if before and (not inner or name in PUBLIC):
        return function
    # Checks are made for arguments that are wrong, and options of compressors go through them.
    if name.startswith("check_") or (name.endswith(".__init__") and not inner) or name in UNCHECKED:
        return function
    checked = beartype(function)

    def call(*arguments: Any, **named: Any) -> Any:
        return checked(*map(_as_jax, arguments), **{k: _as_jax(v) for k, v in named.items()})

    return call
