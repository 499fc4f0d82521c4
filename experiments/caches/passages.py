"""A text cut in two: the prefix whose cache is compressed, and the bytes that ask it."""

import pathlib
from typing import NamedTuple

import ml_collections
import numpy as np
from jaxtyping import Array, Float, UInt8

import coreset_jax as cj
from experiments.common.metrics import BLOCK_SIZE
from experiments.model import cache_file, lm, text

# Where the config leaves the prefix to the file, each head keeps at least this many pairs.
_MIN_PAIRS = 16


class Passage(NamedTuple):
    """A text, cut where the cache ends.

    Attributes:
      name: the name of its file.
      tokens: the bytes of the prefix and of the queries after it.
      length: bytes of the prefix.
    """

    name: str
    tokens: UInt8[np.ndarray, " bytes"]
    length: int

    @property
    def sha256(self) -> str:
        """The digest of the prefix, which is all that the cache depends on."""
        return cache_file.sha256(self.tokens[: self.length].tobytes())


class Workload(NamedTuple):
    """What a model holds after the prefix, and what it asks and should hear afterwards.

    Attributes:
      keys: `[layers, kv_heads, pairs, head_dim]`, after RoPE.
      values: likewise.
      queries: `[layers, kv_heads, queries, head_dim]`, after RoPE, those of all query heads that
        share a key-value head behind one another.
      exact: the attention outputs over the whole prefix, shaped like the queries.
    """

    keys: Float[Array, "layers heads n d"]
    values: Float[Array, "layers heads n d"]
    queries: Float[Array, "layers heads q d"]
    exact: Float[Array, "layers heads q d"]


def all_ratios(config: ml_collections.ConfigDict) -> list[int]:
    """Return the ratios to measure, ascending: those of the table and that of the kept cache.

    Raises:
      ValueError: one is below 2.
    """
    ratios = sorted({*config.ratios, config.ratio})
    if ratios[0] < 2:
        raise ValueError(f"ratios must be integers of at least 2, got {ratios}")
    return ratios


def read_passage(config: ml_collections.ConfigDict) -> Passage:
    """Read the text and decide how long the prefix is.

    Args:
      config: as in `configs/compress_cache.py`.

    Returns:
      The passage: the prefix has `prefix_bytes`, or all that the file has but the queries, up to
      `max_prefix_bytes`.

    Raises:
      OSError: the file is missing or cannot be read.
      ValueError: it is too short, or a number in the config makes no sense.
    """
    ratios = all_ratios(config)
    if config.query_bytes < 1 or not config.seeds:
        raise ValueError(
            "query_bytes must be at least 1 and seeds not empty, "
            f"got {config.query_bytes} and {config.seeds}"
        )
    if config.prefix_bytes is None:
        least = most = _MIN_PAIRS * ratios[-1]
        most = max(most, config.max_prefix_bytes)
    else:
        least = most = config.prefix_bytes
        if least < ratios[-1]:
            raise ValueError(f"prefix_bytes must be at least the ratio {ratios[-1]}, got {least}")
    if config.text is None:
        name, tokens = text.DEMO_PATH, text.demo_text()
    else:
        name, tokens = pathlib.Path(config.text).name, text.read_tokens(config.text)
    needed = least + config.query_bytes
    if tokens.size < needed:
        raise ValueError(
            f"{config.text or name} has {tokens.size} bytes and {needed} are needed: a prefix of "
            f"{least} to compress, and {config.query_bytes} whose queries are asked"
        )
    length = min(most, tokens.size - config.query_bytes)
    return Passage(name, tokens[: length + config.query_bytes], length)


def workload(model: lm.Decoder, passage: Passage) -> Workload:
    """Let the model read the passage, and answer its queries after the prefix exactly."""
    trace = lm.caches(model, passage.tokens)
    keys, values = (array[..., : passage.length, :] for array in (trace.keys, trace.values))
    queries = trace.asked(passage.length)
    exact = cj.attention(queries, keys, values, block_size=BLOCK_SIZE)
    return Workload(keys, values, queries, exact)
