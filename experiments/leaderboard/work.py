"""What the leaderboard measures: coresets of the model's caches, and what they answer."""

import bisect
import functools
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Array, Float

import coreset_jax as cj
from coreset_jax import baselines
from coreset_jax._src.core.coreset import whole_cache
from experiments.common import programs
from experiments.common.methods import METHODS, Method
from experiments.common.metrics import (
    BLOCK_SIZE,
    FLOAT_BYTES,
    coreset_bytes,
    divergence,
    relative_error,
)
from experiments.leaderboard import texts as kinds_of_text
from experiments.model import decoding, lm, text

Cell = dict[str, Any]


class Texts(NamedTuple):
    """The passages of a kind, and what the model holds and asks of them.

    Attributes:
      tokens: `[passages, bytes]`: prompts, and what follows them.
      repeated: the same prompts, followed by passages of themselves.
      keys: those of the prompts, after RoPE, `[passages, layers, kv_heads, pairs, head_dim]`.
      values: likewise.
      fitting: queries of the last bytes of the prompts, for query-informed methods
        `[passages, layers, kv_heads, queries, head_dim]`, those of all query heads that share a
        key-value head behind one another.
      asked: queries of what follows, likewise.
      exact: what they hear from all pairs.
    """

    tokens: np.ndarray
    repeated: np.ndarray
    keys: Float[Array, "passages layers heads n d"]
    values: Float[Array, "passages layers heads n d"]
    fitting: Float[Array, "passages layers heads f d"]
    asked: Float[Array, "passages layers heads q d"]
    exact: Float[Array, "passages layers heads q d"]


def read_texts(model: lm.Decoder, tokens: np.ndarray, prompt: int, fitting: int) -> Texts:
    """Let the model read the passages.

    Args:
      model: the model.
      tokens: prompts and what follows them `[passages, bytes]`.
      prompt: bytes of the prompts.
      fitting: how many of their last bytes are there to be fitted to.
    """
    traces = [lm.caches(model, row) for row in tokens]
    keys, values = (
        jnp.stack([getattr(trace, name)[..., :prompt, :] for trace in traces])
        for name in ("keys", "values")
    )
    asked = jnp.stack([trace.asked(prompt) for trace in traces])
    exact = [
        cj.attention(*each, block_size=BLOCK_SIZE) for each in zip(asked, keys, values, strict=True)
    ]
    return Texts(
        tokens,
        text.with_repeats(tokens, prompt),
        keys,
        values,
        jnp.stack([trace.asked(prompt - fitting, prompt) for trace in traces]),
        asked,
        jnp.stack(exact),
    )


def pairs_kept(method: Method, count: int, width: int, ratio: int) -> int:
    """How many of `count` pairs a method keeps at a ratio.

    Args:
      method: the method.
      count: pairs of a head.
      width: of keys and of values.
      ratio: pairs over pairs kept; for quantized caches bytes over the most bytes kept.

    Raises:
      ValueError: a quantized cache is not defined at this ratio.
    """
    if method.bits is None:
        return -(-count // ratio)
    budget = 2 * width * count * FLOAT_BYTES // ratio
    bits = method.bits

    def weight(size: int) -> int:
        like = jnp.zeros((size, width))
        coreset = jax.eval_shape(lambda: whole_cache(like, like))
        log_weights = 0 if method.has("whole") else FLOAT_BYTES * size
        return baselines.quantized_bytes(coreset, bits) + log_weights

    size = bisect.bisect_right(range(1, count + 1), budget, key=weight)
    if method.has("whole"):
        if size < count:
            raise ValueError(f"in {bits} bits the whole cache takes over 1/{ratio} of its bytes")
    elif size == count:
        raise ValueError(f"in {bits} bits the whole cache fits into 1/{ratio} of its bytes")
    elif size < 1:
        raise ValueError(f"in {bits} bits not one pair fits into 1/{ratio} of the bytes")
    return size


class Work:
    """The model and its texts, read once and only if a cell is missing."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.config = config
        self.model, model_config = lm.load(config.checkpoint)
        self.groups = model_config.num_query_heads // model_config.num_kv_heads
        self.warm: set[tuple[str, int]] = set()
        self._texts: dict[str, Texts] = {}
        self._expected: dict[str, dict[str, np.ndarray]] = {}

    def texts(self, kind: str) -> Texts:
        """The passages of a kind."""
        config = self.config
        if kind not in self._texts:
            length = config.prompt_bytes + config.continuation_bytes
            tokens = kinds_of_text.passages(kind, config.passages, length, config.text_seed)
            self._texts[kind] = read_texts(
                self.model, tokens, config.prompt_bytes, config.fitting_bytes
            )
        return self._texts[kind]

    def tasks(self, kind: str) -> dict[str, tuple[np.ndarray, int]]:
        """The texts by task `[passages, bytes]`, and how many bytes behind the prompt are a cue."""
        texts = self.texts(kind)
        return {"continuation": (texts.tokens, 0), "repeated": (texts.repeated, text.CUE)}

    def expected(self, kind: str) -> dict[str, np.ndarray]:
        """What the model with its full cache expects, by task `[passages, bytes - 1, 256]`."""
        if kind not in self._expected:
            length = self.config.prompt_bytes
            self._expected[kind] = {
                task: np.stack(
                    [np.asarray(lm.predictions(self.model, row))[length:] for row in tokens]
                )
                for task, (tokens, _) in self.tasks(kind).items()
            }
        return self._expected[kind]

    def measure(self, cell: Cell) -> Cell:
        """What belongs to the settings of a cell."""
        if cell["method"] == "exact":
            found = self.exact(cell["kind"])
        else:
            found = self.compressed(cell["method"], cell["kind"], cell["ratio"], cell["seed"])
        if programs.forget_if_many():
            self.warm.clear()
        return found

    def exact(self, kind: str) -> Cell:
        """Bits a byte behind the full cache."""
        texts, length = self.texts(kind), self.config.prompt_bytes
        found: Cell = {"bytes": FLOAT_BYTES * (texts.keys[0].size + texts.values[0].size)}
        for task, (tokens, cue) in self.tasks(kind).items():
            costs = np.asarray(lm.costs_of(self.expected(kind)[task], tokens[:, length:]))
            found[task] = costs[:, cue:].mean(axis=1)
        return found

    def compressed(self, name: str, kind: str, ratio: int, seed: int) -> Cell:
        """Errors, bits a byte, seconds and bytes of a method; or why there are none."""
        method, texts = METHODS[name], self.texts(kind)
        count, width = texts.keys.shape[-2:]
        coresets, seconds = [], []
        try:
            size = pairs_kept(method, count, width, ratio)
            compressor = method.compressor(self.groups)
            for number in range(len(texts.tokens)):
                compress = functools.partial(
                    compressor,
                    jax.random.fold_in(jax.random.key(seed), number),
                    texts.keys[number],
                    texts.values[number],
                    size=size,
                    queries=texts.fitting[number] if method.asks else None,
                )
                if (name, size) not in self.warm:
                    # The first call compiles.
                    jax.block_until_ready(compress())
                    self.warm.add((name, size))
                begun = time.perf_counter()
                coresets.append(jax.block_until_ready(compress()))
                seconds.append(time.perf_counter() - begun)
        except Exception as error:  # Whatever it is, the others go on.
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            logging.warning("%s at %d×: %s", method.label, ratio, reason)
            return {"failed": reason}
        errors = [
            np.asarray(relative_error(*each))
            for each in zip(texts.asked, texts.exact, coresets, strict=True)
        ]
        return {
            "mean": np.mean(errors, axis=-1),
            "tail": np.quantile(errors, 0.99, axis=-1),
            **self._losses(kind, coresets),
            "seconds": seconds,
            "pairs": size,
            "bytes": max(coreset_bytes(each, method.bits) for each in coresets),
        }

    def _losses(self, kind: str, coresets: list[cj.Coreset]) -> Cell:
        """Bits a byte behind the coresets of the prompts, and divergences from the full cache."""
        length, room = self.config.prompt_bytes, self.config.continuation_bytes
        # Each has the axes [layers, heads], and the caches of a layer those of all passages.
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *coresets)
        caches = decoding.behind_coresets(stacked, length, room)
        previous = self.texts(kind).tokens[:, length - 2 : length]
        found = {}
        for task, (tokens, cue) in self.tasks(kind).items():
            behind, exact = tokens[:, length:], self.expected(kind)[task]
            parts = decoding.predictions(self.model, caches, behind, previous)
            heard = np.concatenate([np.asarray(part) for part, _ in parts], axis=1)
            found[task] = np.asarray(lm.costs_of(heard, behind))[:, cue:].mean(axis=1)
            found[f"{task}_divergence"] = divergence(exact[:, cue:], heard[:, cue:])
        return found
