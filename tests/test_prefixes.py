"""Prefix files: whole and unchanged, or refused."""

import json
import pathlib
import struct

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import coreset_jax as cj
from coreset_jax._src.core.coreset import emptied
from coreset_jax.prefixes import Prefix, PrefixFileError, load, save

RNG = np.random.default_rng(0)
COUNTS = np.array([[8, 3], [1, 6], [4, 4]])


def made(dtype=jnp.float32, scale=None):
    shape = (*COUNTS.shape, 8)
    coreset = cj.Coreset(
        jnp.asarray(RNG.normal(size=(*shape, 4)), dtype),
        jnp.asarray(RNG.normal(size=(*shape, 6)), dtype),
        jnp.asarray(RNG.normal(size=shape), jnp.float32),
        jnp.broadcast_to(jnp.arange(8, dtype=jnp.int32), shape),
        None if scale is None else jnp.full(COUNTS.shape, scale),
    )
    held = jnp.asarray(np.arange(8) < COUNTS[..., None])
    return Prefix.of(emptied(coreset, ~held), length=1234, model="tiny", page_size=2)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(jnp.float32, None), (jnp.bfloat16, 0.5), (jnp.float16, None)]
)
def test_what_is_saved_is_loaded(tmp_path, dtype, scale):
    prefix = made(dtype, scale)
    save(tmp_path / "document.safetensors", prefix)
    loaded = load(tmp_path / "document.safetensors", model="tiny")
    chex.assert_trees_all_equal(loaded, prefix)
    assert [layer.keys.dtype for layer in loaded.layers] == [dtype] * 3
    assert (loaded.length, loaded.model) == (1234, "tiny")
    assert list(tmp_path.iterdir()) == [tmp_path / "document.safetensors"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "document.safetensors"
    save(path, made())
    before = path.read_bytes()

    def full(arrays, filename, metadata=None):
        pathlib.Path(filename).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save(path, made())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_files_that_are_cut_short_are_refused(tmp_path):
    path = tmp_path / "document.safetensors"
    save(path, made())
    whole = path.read_bytes()
    for end in np.unique(np.linspace(0, len(whole) - 1, 200).astype(int)):
        path.write_bytes(whole[:end])
        with pytest.raises(PrefixFileError, match=r"document\.safetensors"):
            load(path)


def test_files_with_a_bit_flipped_are_refused(tmp_path):
    path = tmp_path / "document.safetensors"
    save(path, made())
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    # Header and arrays alike.
    places = [RNG.integers(0, 8 * header, 120), RNG.integers(8 * header, 8 * len(whole), 120)]
    for place in np.concatenate(places):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        with pytest.raises(PrefixFileError, match=r"document\.safetensors"):
            load(path)
    path.write_bytes(whole)
    load(path)


def _rewritten(path, **changes):
    """The file with another header, its length and checksum right if they are not what changes."""
    with safetensors.safe_open(path, framework="numpy") as opened:
        header = opened.metadata() | changes
        arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    safetensors.numpy.save_file(arrays, path, metadata=header)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "document.safetensors"
    save(path, made())
    with pytest.raises(PrefixFileError, match="of the model 'tiny', not of 'huge'"):
        load(path, model="huge")
    _rewritten(path, version="2")
    with pytest.raises(PrefixFileError, match="version '2'; this library reads version 1"):
        load(path)
    save(path, made())
    _rewritten(path, model="huge")
    with pytest.raises(PrefixFileError, match="checksum"):
        load(path)
    safetensors.numpy.save_file({"weight": np.zeros(3)}, path)
    with pytest.raises(PrefixFileError, match="no prefix"):
        load(path)
    path.write_text(json.dumps({"weight": 3}))
    with pytest.raises(PrefixFileError, match="no safetensors file"):
        load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load(tmp_path / "nothing.safetensors")


def test_what_cannot_be_a_prefix_is_refused():
    coreset = cj.unpack(made().layers[0], size=8)
    with pytest.raises(ValueError, match=r"\[layers, kv_heads, m\]; got \(2, 8\)"):
        Prefix.of(coreset, length=10, model="tiny")
    with pytest.raises(ValueError, match="length"):
        Prefix.of(jax.tree.map(lambda leaf: leaf[None], coreset), length=0, model="tiny")
