r"""Decodes with the language model over compressed caches: what does the model lose?

    python -m experiments.decode --config=configs/decode.py
    python -m experiments.decode --config=configs/decode.py:demo

Held-out files are read up to a prompt's end; the cache of every layer and head is compressed to
1/2 ... 1/32 of its pairs; and the model reads on. Three tables:

- *continuation*: bits a byte of what the file goes on with, over those of the full cache;
- *repeated text*: the same where the file goes on with a passage from the middle of the prompt, as
  soon as the model can know that it does: what it then needs lies far behind any small window;
- *stream*: bits a byte of a file that is read from an empty cache under a fixed budget.

All methods have caches of the same size: sinks and the newest pairs exactly, and in between what
the method keeps; `window` has no more than sinks and newest pairs. `fitted` is the cache's
default: fitted prompts, and behind them halvings with feedback. A fourth table has
bytes and speed. In ``<output>`` are ``decode.jsonl``, a line for every finished cell, with which an
interrupted run goes on, and ``decode.png``.
"""

import functools
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

import coreset_jax as cj
from experiments import decoder, decoding, lm, results, text
from experiments.decode_figure import draw
from experiments.styles import STYLES

COMPRESSORS: dict[str, cj.Compressor] = {
    "balanced": cj.balanced(),
    "uniform": cj.baselines.uniform(),
    "balance_kv": cj.baselines.balance_kv(),
    "balance_kv_corrected": cj.baselines.balance_kv(corrected=True),
}

# A repeated passage begins with bytes that cannot know yet that it is one.
CUE = 32

Cell = dict[str, Any]


def passages(split: text.Split, count: int, length: int, seed: int) -> np.ndarray:
    """The beginnings of some files that are long enough.

    Args:
      split: `"train"` or `"heldout"`.
      count: how many files.
      length: bytes of each.
      seed: which files.

    Returns:
      int32 `[count, length]`.

    Raises:
      ValueError: there are not so many files so long.
    """
    files = [path for path in text.stdlib_files(split) if path.stat().st_size >= length]
    if len(files) < count:
        raise ValueError(f"{split} has {len(files)} files of {length} bytes, {count} are asked for")
    order = np.random.default_rng(seed).permutation(len(files))[:count]
    return np.stack([text.read_tokens(files[i])[:length] for i in order]).astype(np.int32)


def with_repeats(tokens: np.ndarray, prompt: int) -> np.ndarray:
    """The texts with passages of their prompts in place of what comes behind.

    The passages are spread over the prompts, from a fifth to four fifths of them.
    """
    length = tokens.shape[1] - prompt
    last = max(prompt - length, 0)
    starts = np.linspace(prompt // 5, min(4 * prompt // 5, last), tokens.shape[0]).astype(int)
    copies = [row[start : start + length] for row, start in zip(tokens, starts, strict=True)]
    return np.concatenate([tokens[:, :prompt], np.stack(copies)], axis=1)


class Work:
    """The model and its prompts, read once and only if a cell is missing."""

    def __init__(self, config: ml_collections.ConfigDict) -> None:
        self.config = config
        self.model, self.model_config = lm.load(config.checkpoint)
        self._prompt: decoding.Prompt | None = None
        self.tokens = passages(
            config.split,
            config.passages,
            config.prompt_bytes + config.continuation_bytes,
            config.seed,
        )

    @property
    def prompt(self) -> decoding.Prompt:
        """The keys and values of the prompts."""
        if self._prompt is None:
            tokens = self.tokens[:, : self.config.prompt_bytes]
            self._prompt = decoding.read_prompt(self.model, tokens)
        return self._prompt

    def prompts(self, method: str, ratio: int) -> Cell:
        """Bits a byte behind compressed prompts."""
        config, length = self.config, self.config.prompt_bytes
        size = length // ratio
        block = max(2, min(config.block_size, size // 8 // 2 * 2))
        cache = decoding.cache_config(method, size, config.recent_share, block, COMPRESSORS)
        caches = decoding.prefilled(self.prompt, cache, config.continuation_bytes)
        previous = self.tokens[:, length - 2 : length]
        repeated = with_repeats(self.tokens, length)
        return {
            "continuation": decoding.costs(
                self.model, caches, self.tokens[:, length:], previous
            ).mean(axis=1),
            "repeated": decoding.costs(self.model, caches, repeated[:, length:], previous)[
                :, CUE:
            ].mean(axis=1),
            "bytes": sum(each.nbytes for each in caches),
        }

    def stream(self, method: str) -> Cell:
        """Bits a byte of files read from an empty cache."""
        config = self.config
        tokens = passages(
            config.split, config.stream_passages, config.stream_bytes, config.seed + 1
        )
        cache = decoding.cache_config(
            method, config.stream_size, config.recent_share, config.block_size, COMPRESSORS
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
        shape = (
            self.model_config.num_layers,
            1,
            pairs,
            self.model_config.num_kv_heads,
            self.model_config.head_dim,
        )
        keys, values = jax.random.normal(rng, (2, *shape))
        prompt = decoding.Prompt(np.zeros((1, pairs), np.int32), keys, values)
        full = decoding.prefilled(prompt, None, config.speed_turns + 1)
        cache = decoding.cache_config(
            "fitted", pairs // ratio, config.recent_share, config.block_size, {}
        )
        compressed = decoding.prefilled(prompt, cache, 0)
        token, previous = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 2), jnp.int32)
        query = jax.random.normal(rng, (1, 1, self.model_config.num_query_heads, shape[-1]))
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


def cells(config: ml_collections.ConfigDict) -> list[Cell]:
    """The settings of all cells, in the order in which they are measured."""
    shared = {
        "experiment": "decode",
        "model": results.digest(config.checkpoint or lm.CHECKPOINT),
        "code": results.digest(__file__, decoding.__file__, decoder.__file__, text.__file__),
        "split": config.split,
        "seed": config.seed,
        "block_size": config.block_size,
        "recent_share": config.recent_share,
    }
    prompts = {
        "passages": config.passages,
        "prompt_bytes": config.prompt_bytes,
        "continuation_bytes": config.continuation_bytes,
    }
    stream = {
        "passages": config.stream_passages,
        "stream_bytes": config.stream_bytes,
        "stream_size": config.stream_size,
    }
    found: list[Cell] = [{**shared, **prompts, "task": "prompts", "method": "exact", "ratio": 1}]
    found += [
        {**shared, **prompts, "task": "prompts", "method": method, "ratio": ratio}
        for ratio in config.ratios
        for method in config.methods
    ]
    if config.stream_bytes:
        found += [
            {**shared, **stream, "task": "stream", "method": method}
            for method in ("exact", *config.methods)
        ]
    found.append(
        {
            **shared,
            "task": "speed",
            "pairs": config.speed_pairs,
            "ratio": config.speed_ratio,
            "turns": config.speed_turns,
        }
    )
    return found


def measure(config: ml_collections.ConfigDict, store: results.Results) -> list[tuple[Cell, Cell]]:
    """Measure the cells that the store does not have yet; all of them with what was found."""
    work: Work | None = None
    found = []

    def label(cell: Cell) -> str:
        return " ".join(str(cell[name]) for name in ("task", "method", "ratio") if name in cell)

    for cell in results.track(cells(config), "decoding", label=label):
        known = store.get(cell)
        if known is None:
            work = Work(config) if work is None else work
            if cell["task"] == "prompts":
                store.put(cell, work.prompts(cell["method"], cell["ratio"]))
            elif cell["task"] == "stream":
                store.put(cell, work.stream(cell["method"]))
            else:
                store.put(cell, work.speed(cell["ratio"]))
            known = store.get(cell)
            assert known is not None
        found.append((cell, known))
    return found


def _name(method: str) -> str:
    return STYLES[method].label


def print_prompts(config: ml_collections.ConfigDict, found: list[tuple[Cell, Cell]]) -> None:
    """Print the losses behind compressed prompts."""
    table = {
        (cell["method"], cell["ratio"]): known for cell, known in found if cell["task"] == "prompts"
    }
    exact = table["exact", 1]
    for task, title in (
        ("continuation", "Continuation of the file"),
        ("repeated", "A passage of the prompt repeated"),
    ):
        rows = []
        for method in config.methods:
            losses = [
                np.mean(table[method, ratio][task]) - np.mean(exact[task])
                for ratio in config.ratios
            ]
            rows.append([_name(method), *(f"{loss:+.4f}" for loss in losses)])
        results.print_table(
            f"{title}: bits a byte over those of the full cache, {np.mean(exact[task]):.4f}",
            ["method", *(f"{ratio}×" for ratio in config.ratios)],
            rows,
            left=("method",),
            caption=(
                f"{config.passages} {config.split} files, prompts of {config.prompt_bytes} bytes, "
                f"{config.continuation_bytes} bytes behind each; caches of equal size, a "
                f"{config.recent_share:.0%} share of them recent pairs.\n"
                + results.stamp(config.seed)
            ),
        )


def print_stream(config: ml_collections.ConfigDict, found: list[tuple[Cell, Cell]]) -> None:
    """Print what a stream costs under a budget."""
    rows = [
        [
            _name(cell["method"]),
            f"{known['bits_per_byte']:.4f}",
            f"{known['late']:.4f}",
            f"{known['bytes'] / 1e6:.2f}",
        ]
        for cell, known in found
        if cell["task"] == "stream"
    ]
    if rows:
        results.print_table(
            f"Streams of {config.stream_bytes} bytes from an empty cache, "
            f"{config.stream_size} pairs a head",
            ["method", "bits/byte", "second half", "cache MB"],
            rows,
            left=("method",),
            caption=f"{config.stream_passages} {config.split} files",
        )


def print_speed(found: list[tuple[Cell, Cell]]) -> None:
    """Print bytes and times of full and compressed caches."""
    for cell, known in found:
        if cell["task"] != "speed":
            continue
        rows = [
            [
                name,
                f"{known[f'{name} bytes'] / 1e6:.2f}",
                f"{1 / known[f'{name} step']:.0f}",
                f"{1e6 * known[f'{name} attention']:.0f}",
            ]
            for name in ("full", "compressed")
        ]
        rows.append(
            [
                "gain",
                f"{known['full bytes'] / known['compressed bytes']:.2f}",
                f"{known['step gain']:.2f}",
                f"{known['attention gain']:.2f}",
            ]
        )
        results.print_table(
            f"Decoding behind {cell['pairs']} pairs, {cell['ratio']}×, one sequence",
            ["cache", "MB", "tokens/s", "attention of a layer, µs"],
            rows,
            left=("cache",),
            caption=(
                f"{cell['turns']} steps of both in turns: tokens/s in the mean, compressions "
                "included; attention in the median."
            ),
        )


def run(config: ml_collections.ConfigDict) -> list[tuple[Cell, Cell]]:
    """Measure, print and draw."""
    output = pathlib.Path(config.output)
    store = results.Results(output / "decode.jsonl", fresh=config.fresh)
    found = measure(config, store)
    print_prompts(config, found)
    print_stream(config, found)
    print_speed(found)
    with results.replacing(output / "decode.png") as partial:
        draw(found).savefig(partial)
    print(output / "decode.jsonl")
    print(output / "decode.png")
    return found


def main(arguments: Sequence[str]) -> None:
    """Does what the flags describe."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    results.start_logging()
    try:
        run(flags.FLAGS.config)
    except ValueError as error:
        sys.exit(f"decode: {error}")


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/decode.py")
    app.run(main)
