r"""Decodes with the language model over compressed caches: what does the model lose?

    python -m experiments.decode.decode --config=configs/decode.py
    python -m experiments.decode.decode --config=configs/decode.py:demo

Held-out files are read up to a prompt's end; the cache of every layer and head is compressed to
1/2 ... 1/32 of its pairs; and the model reads on. Three tables:

- *continuation*: bits a byte of what the file goes on with, over those of the full cache;
- *repeated text*: the same where the file goes on with a passage from the middle of the prompt, as
  soon as the model can know that it does: what it then needs lies far behind any small window;
- *stream*: bits a byte of a file that is read from an empty cache under a fixed budget.

All methods have caches of the same size: sinks and the newest pairs exactly, and in between what
the method keeps; `window` has no more than sinks and newest pairs. `fitted` is the cache's
default: a fit of the prompt, and of what joins the middle behind it. A fourth table has
bytes and speed. In ``<output>`` are ``decode.jsonl``, a line for every finished cell, with which an
interrupted run goes on, and ``decode.png``.
"""

import functools
import pathlib

import ml_collections
import numpy as np

from experiments.common import command, figures, methods, results
from experiments.common.methods import METHODS
from experiments.common.tables import print_table, stamp
from experiments.decode import work as works
from experiments.decode.figure import Found, draw
from experiments.decode.work import Cell, Work
from experiments.model import attention, decoder, decoding, lm, text


def cells(config: ml_collections.ConfigDict) -> list[Cell]:
    """The settings of all cells, in the order in which they are measured."""
    shared = {
        "experiment": "decode",
        "model": results.digest(config.checkpoint or lm.CHECKPOINT),
        "code": results.source_digest(works, methods, attention, decoding, decoder, text),
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
    speed = {"pairs": config.speed_pairs, "ratio": config.speed_ratio, "turns": config.speed_turns}
    found.append({**shared, "task": "speed", **speed})
    return found


def measure(config: ml_collections.ConfigDict, store: results.Results) -> Found:
    """Measure the cells that the store does not have yet; all of them with what was found."""
    work = functools.cache(lambda: Work(config))
    every = cells(config)
    known = store.complete(
        every,
        lambda cell: work().measure(cell),
        "decoding",
        settings=dict,
        label=results.labeled_by("task", "method", "ratio"),
    )
    return list(zip(every, known, strict=True))


def print_prompts(config: ml_collections.ConfigDict, found: Found) -> None:
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
            costs = [np.mean(table[method, ratio][task]) for ratio in config.ratios]
            losses = [f"{cost - np.mean(exact[task]):+.4f}" for cost in costs]
            rows.append([METHODS[method].label, *losses])
        print_table(
            f"{title}: bits a byte over those of the full cache, {np.mean(exact[task]):.4f}",
            ["method", *(f"{ratio}×" for ratio in config.ratios)],
            rows,
            left=("method",),
            caption=(
                f"{config.passages} {config.split} files, prompts of {config.prompt_bytes} bytes, "
                f"{config.continuation_bytes} bytes behind each; caches of equal size, a "
                f"{config.recent_share:.0%} share of them recent pairs.\n" + stamp(config.seed)
            ),
        )


def print_stream(config: ml_collections.ConfigDict, found: Found) -> None:
    """Print what a stream costs under a budget."""
    rows = [
        [
            METHODS[cell["method"]].label,
            f"{known['bits_per_byte']:.4f}",
            f"{known['late']:.4f}",
            f"{known['bytes'] / 1e6:.2f}",
        ]
        for cell, known in found
        if cell["task"] == "stream"
    ]
    if rows:
        print_table(
            f"Streams of {config.stream_bytes} bytes from an empty cache, "
            f"{config.stream_size} pairs a head",
            ["method", "bits/byte", "second half", "cache MB"],
            rows,
            left=("method",),
            caption=f"{config.stream_passages} {config.split} files",
        )


def print_speed(found: Found) -> None:
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
        gains = known["full bytes"] / known["compressed bytes"], known["step gain"]
        rows.append(["gain", *(f"{gain:.2f}" for gain in (*gains, known["attention gain"]))])
        print_table(
            f"Decoding behind {cell['pairs']} pairs, {cell['ratio']}×, one sequence",
            ["cache", "MB", "tokens/s", "attention of a layer, µs"],
            rows,
            left=("cache",),
            caption=(
                f"{cell['turns']} steps of both in turns: tokens/s in the mean, compressions "
                "included; attention in the median."
            ),
        )


def run(config: ml_collections.ConfigDict) -> Found:
    """Measure, print and draw."""
    output = pathlib.Path(config.output)
    store = results.Results(output / "decode.jsonl", fresh=config.fresh)
    found = measure(config, store)
    print_prompts(config, found)
    print_stream(config, found)
    print_speed(found)
    figures.save(output / "decode.png", draw(found))
    print(output / "decode.jsonl")
    print(output / "decode.png")
    return found


if __name__ == "__main__":
    command.main(run, "configs/decode.py", ValueError)
