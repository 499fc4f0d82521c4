"""What `experiments.decode.decode` measures: bits a byte, bytes and seconds behind caches."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from experiments.model import decoding, lm, text

Cell = dict[str, Any]


class Work:
    """The model and its prompts, read once and only if a cell is missing."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.config = config
        self.model, self.model_config = lm.load(config.checkpoint)
        length = config.prompt_bytes + config.continuation_bytes
        self.tokens = text.beginnings(config.split, config.passages, length, config.seed)

    @functools.cached_property
    def prompt(self) -> decoding.Prompt:
        """The keys and values of the prompts."""
        return decoding.read_prompt(self.model, self.tokens[:, : self.config.prompt_bytes])

    def measure(self, cell: Cell) -> Cell:
        """What belongs to the settings of a cell."""
        if cell["task"] == "prompts":
            return self.prompts(cell["method"], cell["ratio"])
        if cell["task"] == "stream":
            return self.stream(cell["method"])
        return self.speed(cell["ratio"])

    def prompts(self, method: str, ratio: int) -> Cell:
        """Bits a byte behind compressed prompts."""
        config, length = self.config, self.config.prompt_bytes
        size = length // ratio
        block = max(2, min(config.block_size, size // 8 // 2 * 2))
        cache = decoding.cache_config(method, size, config.recent_share, block)
        caches = decoding.prefilled(self.prompt, cache, config.continuation_bytes)
        previous = self.tokens[:, length - 2 : length]
        repeated = text.with_repeats(self.tokens, length)
        costs, again = (
            decoding.costs(self.model, caches, tokens[:, length:], previous)
            for tokens in (self.tokens, repeated)
        )
        return {
            "continuation": costs.mean(axis=1),
            "repeated": again[:, text.CUE :].mean(axis=1),
            "bytes": sum(each.nbytes for each in caches),
        }

    def stream(self, method: str) -> Cell:
        """Bits a byte of files read from an empty cache."""
        config = self.config
        tokens = text.beginnings(
            config.split, config.stream_passages, config.stream_bytes, config.seed + 1
        )
        cache = decoding.cache_config(
            method, config.stream_size, config.recent_share, config.block_size
        )
        caches = decoding.empty(self.model_config, len(tokens), cache, config.stream_bytes)
        costs = decoding.costs(self.model, caches, tokens, piece=config.block_size)
        pieces = np.array_split(costs.mean(axis=0), 16)
        return {
            "bits_per_byte": float(costs.mean()),
            "late": float(costs[:, costs.shape[1] // 2 :].mean()),
            "curve": [float(piece.mean()) for piece in pieces],
            "bytes": sum(each.nbytes for each in caches),
        }

    def speed(self, ratio: int) -> Cell:
        """Bytes of the caches, and time of decoding a byte, full and compressed in turns."""
        config, pairs = self.config, self.config.speed_pairs
        rng = jax.random.key(config.seed)
        model = self.model_config
        shape = (model.num_layers, 1, pairs, model.num_kv_heads, model.head_dim)
        keys, values = jax.random.normal(rng, (2, *shape))
        prompt = decoding.Prompt(np.zeros((1, pairs), np.int32), keys, values)
        full = decoding.prefilled(prompt, None, config.speed_turns + 1)
        cache = decoding.cache_config(
            "fitted", pairs // ratio, config.recent_share, config.block_size
        )
        compressed = decoding.prefilled(prompt, cache, 0)
        token, previous = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 2), jnp.int32)
        query = jax.random.normal(rng, (1, 1, model.num_query_heads, shape[-1]))
        attend = jax.jit(lambda cache, query, key: cache.attend(query, key, key))
        step: dict[str, list[float]] = {"full": [], "compressed": []}
        attention: dict[str, list[float]] = {"full": [], "compressed": []}

        def timed(call: Callable[[], Any], seconds: list[float]) -> Any:
            begun = time.perf_counter()
            result = jax.block_until_ready(call())
            seconds.append(time.perf_counter() - begun)
            return result

        state = {"full": full, "compressed": compressed}
        for _ in range(config.speed_turns + 1):
            for name, caches in state.items():
                read = functools.partial(attend, caches[0], query, keys[0, :, :1])
                timed(read, attention[name])
                decode = functools.partial(decoding.fused_step, self.model, caches, token, previous)
                _, state[name] = timed(decode, step[name])
        found: Cell = {}
        for name in state:
            # The first turn compiles. Steps in the mean: one in many of them compresses.
            found[f"{name} step"] = float(np.mean(step[name][1:]))
            found[f"{name} attention"] = float(np.median(attention[name][1:]))
        found["step gain"] = found["full step"] / found["compressed step"]
        found["attention gain"] = float(
            np.median(np.divide(attention["full"][1:], attention["compressed"][1:]))
        )
        found["full bytes"] = sum(each.nbytes for each in full)
        found["compressed bytes"] = sum(each.nbytes for each in compressed)
        return found
