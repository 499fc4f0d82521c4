"""Compressed documents that sequences begin with: made once, kept in a file, opened by many.

A prefix is what a model's caches hold of a document, packed, a
:class:`~coreset_jax.PackedCoreset` a layer. :func:`save` writes it to one file and :func:`load`
reads it back, both with the package ``safetensors`` (``pip install coreset-jax[files]``).
"""

import dataclasses
import functools
import hashlib
import json
import operator
import os
import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from coreset_jax._src import checks
from coreset_jax._src.core.coreset import Coreset
from coreset_jax._src.core.packed import PackedCoreset, pack

# What a file says that it is. Whoever changes what is in one counts the version up.
_FORMAT, _VERSION = "coreset_jax.prefix", 1

_FIELDS = ("keys", "values", "log_weights", "indices", "offsets", "scale")


class PrefixFileError(ValueError):
    """A file is no prefix of this version and model, or is damaged; nothing of it was loaded."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["layers"],
    meta_fields=["length", "model"],
)
@dataclasses.dataclass(frozen=True)
class Prefix:
    """What the caches of a model hold of a document that was compressed.

    A pytree whose arrays are those of its layers.

    Attributes:
      layers: a packed coreset a layer, without a batch: ``keys [slots, d]``, and so on. Layers may
        have different numbers of slots.
      length: tokens of the document; what comes next stands at this position.
      model: a name of the model whose caches these are; what is loaded is checked against it.
    """

    layers: tuple[PackedCoreset, ...]
    length: int
    model: str

    @classmethod
    def of(
        cls,
        coreset: Coreset,
        *,
        length: int,
        model: str,
        page_size: int = 16,
        num_slots: int | None = None,
    ) -> "Prefix":
        """The prefix of a coreset of all layers.

        Args:
          coreset: a coreset ``[layers, kv_heads, m]``, as of ``cj.attended(axes=(0, 1))``.
          length: tokens of the document.
          model: a name of the model.
          page_size: as in :func:`coreset_jax.pack`.
          num_slots: slots of every layer. Documents with as many share their programs; ``None``
            means as many as each layer needs.

        Raises:
          ValueError: if the coreset has other axes, is traced, or ``length`` is below 1.

        >>> import jax, coreset_jax as cj
        >>> keys, values, queries = jax.random.normal(jax.random.key(0), (3, 2, 4, 512, 16))
        >>> compressor = cj.attended(axes=(0, 1))
        >>> coreset = compressor(jax.random.key(1), keys, values, size=64, queries=queries)
        >>> prefix = cj.prefixes.Prefix.of(coreset, length=512, model="mine")
        >>> len(prefix.layers), prefix.layers[0].num_heads
        (2, 4)
        """
        checks.check_count("length", length)
        if checks.is_traced(coreset.log_weights):
            raise ValueError("coreset must not be traced: its pairs say how many slots there are.")
        if coreset.log_weights.ndim != 3:
            raise ValueError(
                "coreset must have log_weights [layers, kv_heads, m]; got "
                f"{coreset.log_weights.shape}."
            )
        packed = []
        for number in range(coreset.keys.shape[0]):
            layer = jax.tree.map(operator.itemgetter(number), coreset)
            packed.append(pack(layer, page_size=page_size, num_slots=num_slots))
        return cls(tuple(packed), int(length), model)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(layer.nbytes for layer in self.layers)


def save(path: str | os.PathLike[str], prefix: Prefix) -> None:
    """Writes a prefix to a file, in the format of safetensors.

    The file is written aside, and takes its name when it is whole. Its header names the format and
    version, model, positions, page sizes, and a SHA-256 of all of this and all arrays.

    Args:
      path: the file; one that exists is replaced.
      prefix: the prefix; its arrays must not be traced.

    Raises:
      ModuleNotFoundError: if the package safetensors is missing.
      ValueError: if arrays are traced.
      OSError: if the file cannot be written; one that was there is still there.

    >>> import jax, tempfile, coreset_jax as cj
    >>> keys, values = jax.random.normal(jax.random.key(0), (2, 2, 4, 256, 16))
    >>> coreset = cj.baselines.uniform()(jax.random.key(1), keys, values, size=32)
    >>> prefix = cj.prefixes.Prefix.of(coreset, length=256, model="mine")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cj.prefixes.save(f"{folder}/document.safetensors", prefix)
    ...     loaded = cj.prefixes.load(f"{folder}/document.safetensors", model="mine")
    >>> loaded.length
    256
    """
    library = _safetensors()
    if any(checks.is_traced(leaf) for leaf in jax.tree.leaves(prefix)):
        raise ValueError("prefix must not be traced: what is written must be known.")
    arrays = {
        f"{number}.{name}": np.asarray(getattr(layer, name))
        for number, layer in enumerate(prefix.layers)
        for name in _FIELDS
        if getattr(layer, name) is not None
    }
    header = {
        "format": _FORMAT,
        "version": str(_VERSION),
        "model": prefix.model,
        "length": str(prefix.length),
        "page_sizes": json.dumps([layer.page_size for layer in prefix.layers]),
    }
    header["sha256"] = _digest(header, arrays)
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        library.numpy.save_file(arrays, partial, metadata=header)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, model: str | None = None) -> Prefix:
    """Reads a prefix that :func:`save` wrote, whole or not at all.

    Args:
      path: the file.
      model: the name of the model that it must be of; ``None`` takes any.

    Returns:
      The prefix, bit by bit what was saved.

    Raises:
      FileNotFoundError: if there is no such file.
      ModuleNotFoundError: if the package safetensors is missing.
      PrefixFileError: a ``ValueError``, if the file is cut short or altered, is no prefix, is of a
        later version, or of another model.
    """
    library = _safetensors()
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with library.safe_open(str(path), framework="numpy") as opened:
            header = opened.metadata() or {}
            _check_kind(path, header)
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except PrefixFileError:
        raise
    except Exception as error:  # Whatever the reader dies of, the file is to blame.
        raise PrefixFileError(f"{path} is damaged or no safetensors file: {error}") from error
    claimed = header.pop("sha256", "")
    if _digest(header, arrays) != claimed:
        raise PrefixFileError(f"{path} is damaged: its checksum is not that of what it holds.")
    if model is not None and header["model"] != model:
        raise PrefixFileError(
            f"{path} is a prefix of the model {header['model']!r}, not of {model!r}."
        )
    layers = tuple(
        PackedCoreset(
            **{
                name: _array(arrays[f"{number}.{name}"])
                for name in _FIELDS
                if f"{number}.{name}" in arrays
            },
            page_size=page_size,
        )
        for number, page_size in enumerate(json.loads(header["page_sizes"]))
    )
    return Prefix(layers, int(header["length"]), header["model"])


def _check_kind(path: pathlib.Path, header: Mapping[str, str]) -> None:
    """Raises :class:`PrefixFileError` unless a header is that of a prefix of this version."""
    if header.get("format") != _FORMAT:
        raise PrefixFileError(f"{path} is no prefix: its format is {header.get('format')!r}.")
    if header.get("version") != str(_VERSION):
        raise PrefixFileError(
            f"{path} has version {header.get('version')!r}; this library reads version {_VERSION}."
        )


def _array(array: np.ndarray) -> Array:
    loaded = jnp.asarray(array)
    if loaded.dtype != array.dtype:
        raise PrefixFileError(f"arrays of {array.dtype} need jax_enable_x64.")
    return loaded


def _digest(header: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of all that a file says but its own checksum."""
    digest = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(json.dumps([name, str(array.dtype), array.shape]).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _safetensors() -> ModuleType:
    try:
        import safetensors
        import safetensors.numpy
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "prefix files need the package safetensors: pip install coreset-jax[files]",
            name="safetensors",
        ) from error
    found: Any = safetensors
    return found
