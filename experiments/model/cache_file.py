"""Compressed caches as safetensors: what was kept of every layer and head, and of what.

A file holds ``layers.<i>.keys``, ``.values``, ``.log_weights`` and ``.indices`` for every layer,
each with a leading axis of key-value heads, so that any reader of safetensors can take a layer
alone; and ``.scale``, the softmax scale of every head, if compression was given one. Its header
says which text and model the cache came from.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

import coreset_jax as cj
from coreset_jax.baselines import SignedCoreset
from experiments.common import results
from experiments.model import lm

FORMAT = "coreset_jax compressed cache 1"
"""The entry `format` in the header of every file."""

# The other entries of the header, beside those of the source.
_SHAPE = ("layers", "kv_heads", "size", "key_dim", "value_dim")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a compressed cache came from.

    Attributes:
      text_name: the name of the text.
      text_sha256: digest of the `length` bytes of it that were read.
      length: pairs that every head had before compression.
      model_sha256: digest of the model's checkpoint.
      method: the compressor.
      ratio: `length` over the pairs kept.
      seed: the compressor's random seed.
      version: the version of coreset_jax.
    """

    text_name: str
    text_sha256: str
    length: int
    model_sha256: str
    method: str
    ratio: int
    seed: int
    version: str = cj.__version__


class CompressedCache(NamedTuple):
    """A compressed cache and its origin.

    Attributes:
      coreset: all layers and heads, leading axes `[layers, kv_heads]`.
      source: where it came from.
    """

    coreset: cj.Coreset | SignedCoreset
    source: Source


def sha256(content: bytes | os.PathLike[str]) -> str:
    """Return the SHA-256 digest of bytes, or of the file at a path, in hexadecimal."""
    data = content if isinstance(content, bytes) else pathlib.Path(content).read_bytes()
    return hashlib.sha256(data).hexdigest()


def save(path: str | os.PathLike[str], cache: CompressedCache) -> None:
    """Write a compressed cache aside, then rename it into its place.

    Args:
      path: the file; its folder is made where needed.
      cache: leading axes `[layers, kv_heads]`.

    Raises:
      ValueError: the coreset is not one of `cache.source.length` pairs; see `load`.
    """
    arrays = {field: array for field, array in cache.coreset._asdict().items() if array is not None}
    fields = {field: np.asarray(array) for field, array in arrays.items()}
    _check(path, fields, cache.source)
    layers, heads, size, width = fields["keys"].shape
    shape = dict(zip(_SHAPE, (layers, heads, size, width, fields["values"].shape[-1]), strict=True))
    header = {"format": FORMAT, **dataclasses.asdict(cache.source), **shape}
    tensors = {
        # safetensors writes the buffer as it lies, so that a layer must lie by itself.
        f"layers.{layer}.{field}": np.ascontiguousarray(array[layer])
        for field, array in fields.items()
        for layer in range(layers)
    }
    with results.replacing(path) as partial:
        metadata = {name: str(entry) for name, entry in header.items()}
        safetensors.numpy.save_file(tensors, partial, metadata=metadata)


def load(path: str | os.PathLike[str]) -> CompressedCache:
    """Read a compressed cache and check it.

        cache = cache_file.load("outputs/demo/cache-8x.safetensors")
        layer = jax.tree.map(lambda array: array[0], cache.coreset)
        outputs = cj.attend(queries, layer)  # queries [kv_heads, q, head_dim], after RoPE

    Args:
      path: a file written by `save`.

    Returns:
      The cache, its arrays bit-identical to those that were saved.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a compressed cache, or damaged: a tensor is missing or of another shape
        than the header says, a key, value or weight is not finite, or the indices are not distinct,
        ascending positions of the source with `-inf` as the log-weight of just the empty slots.
    """
    file = pathlib.Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no compressed cache at {file}")
    try:
        with safetensors.safe_open(file, framework="numpy") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {header.get('format')!r} in its header, not {FORMAT!r}"
        )
    try:
        entries: dict[str, Any] = {
            field.name: int(header[field.name]) if field.type is int else header[field.name]
            for field in dataclasses.fields(Source)
        }
        source = Source(**entries)
        layers, heads, size, key_dim, value_dim = (int(header[name]) for name in _SHAPE)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{file} has a header with a missing or broken entry: {error}") from error

    expected = {
        "keys": (heads, size, key_dim),
        "values": (heads, size, value_dim),
        "log_weights": (heads, size),
        "indices": (heads, size),
    }
    if "layers.0.normalizers" in tensors:
        expected["normalizers"] = (heads, size)
    if "layers.0.scale" in tensors:
        expected["scale"] = (heads,)
    shapes = {f"layers.{i}.{field}": expected[field] for i in range(layers) for field in expected}
    lm.check_shapes(f"{file} does not fit its own header", shapes, tensors)
    fields = {
        field: np.stack([tensors[f"layers.{i}.{field}"] for i in range(layers)])
        for field in expected
    }
    _check(file, fields, source)
    arrays = {field: jnp.asarray(array) for field, array in fields.items()}
    kind = SignedCoreset if "normalizers" in arrays else cj.Coreset
    return CompressedCache(kind(**arrays), source)


def num_bytes(*arrays: jax.Array | None) -> int:
    """Return how many bytes arrays hold, `None` counting nothing."""
    return sum(array.nbytes for array in arrays if array is not None)


def _check(path: str | os.PathLike[str], fields: Mapping[str, np.ndarray], source: Source) -> None:
    """Refuse what no compressor of a finite cache returns."""
    indices, log_weights = fields["indices"], fields["log_weights"]
    if fields["keys"].ndim != 4:
        raise ValueError(
            "keys must have axes [layers, kv_heads, size, head_dim]; "
            f"those for {path} have shape {fields['keys'].shape}"
        )
    empty = indices < 0
    # Empty slots count as positions behind the source, each farther out than the one before.
    slots = np.arange(indices.shape[-1], dtype=np.int64)
    places = np.where(empty, source.length + slots, indices)
    if not np.issubdtype(indices.dtype, np.integer) or not (
        np.all(np.diff(places) > 0) and np.all(indices[~empty] < source.length)
    ):
        raise ValueError(
            f"indices for {path} are not distinct, ascending integers below {source.length}"
        )
    if not np.array_equal(np.isneginf(log_weights), empty):
        raise ValueError(f"log_weights for {path} are not -inf in just the empty slots")
    for field, array in fields.items():
        kept = array[~empty] if field == "log_weights" else array
        if field != "indices" and not np.all(np.isfinite(kept.astype(np.float64))):
            raise ValueError(f"{field} for {path} hold a NaN or an infinity")
