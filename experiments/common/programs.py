"""Compiled programs, of which a process can hold only so many."""

import pathlib

import jax

# Linux gives a process 65,530 memory mappings, and compiled programs take a few each: where one
# more is not to be had, the compiler ends the process.
_MAPPINGS = pathlib.Path("/proc/self/maps")
_MOST_MAPPINGS = 25_000


def forget_if_many() -> bool:
    """Lets all compiled programs go if there are too many of them, and tells whether it did."""
    many = _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > _MOST_MAPPINGS
    if many:
        jax.clear_caches()
    return many
