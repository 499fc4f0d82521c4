r"""Compresses the KV cache of a real text and asks what the model asks next.

    python -m experiments.caches.compress_cache --config=configs/compress_cache.py:demo
    python -m experiments.caches.compress_cache --config=configs/compress_cache.py \
      --config.ratio=8 --config.text=FILE

The shipped language model reads a text. Every layer and head of its cache, after a prefix of the
text, is compressed by each method to 1/2, 1/4, 1/8 and 1/16 of its pairs. The queries are those of
the following bytes, after RoPE: what the model goes on to ask this cache. All query heads of a
group ask the key-value head that they share, and the error of a head is

.. math::
   \frac{\mathrm{mean}_q \|\mathrm{Attn}'(q) - \mathrm{Attn}(q)\|}
        {\mathrm{mean}_q \|\mathrm{Attn}(q)\|}

with the exact attention over the same prefix. One table has the errors; in ``<output>`` are
``errors.jsonl`` (every method, ratio, layer and head), ``errors.png`` and
``cache-<ratio>x.safetensors``, the cache as our method keeps it, for
:func:`experiments.model.cache_file.load`.
"""

import pathlib

import jax
import ml_collections
import numpy as np
from absl import logging

import coreset_jax as cj
from experiments.caches.compress_figure import Measured, Table, draw
from experiments.caches.passages import Passage, Workload, all_ratios, read_passage, workload
from experiments.common import command, figures, progress, results
from experiments.common.methods import METHODS, REFERENCE
from experiments.common.metrics import geometric_mean, relative_error
from experiments.common.tables import print_table, stamp
from experiments.model import cache_file, lm

OURS = "fitted"
NAMES = ("uniform", "balance_kv", "balance_kv_corrected", "balanced", "fitted")


def measure(config: ml_collections.ConfigDict, work: Workload) -> tuple[Table, cj.Coreset]:
    """Compress by every method, at every ratio, with every seed.

    Args:
      config: as in `configs/compress_cache.py`.
      work: the cache and its queries.

    Returns:
      The errors, and the coreset of our method at `config.ratio` with the first seed.
    """
    count = work.keys.shape[-2]
    jobs = [
        (ratio, name, seed)
        for ratio in all_ratios(config)
        for name in NAMES
        for seed in config.seeds
    ]
    kept: cj.Coreset | None = None
    errors: dict[tuple[str, int], list[np.ndarray]] = {}
    for ratio, name, seed in progress.track(
        jobs, "compressing", label=lambda job: f"{job[0]}×, {METHODS[job[1]].label}, seed {job[2]}"
    ):
        compressor = METHODS[name].compressor()
        coreset = compressor(jax.random.key(seed), work.keys, work.values, size=-(-count // ratio))
        error = relative_error(work.queries, work.exact, coreset).mean(axis=-1)
        errors.setdefault((name, ratio), []).append(np.asarray(error))
        if (ratio, name, seed) == (config.ratio, OURS, config.seeds[0]):
            kept = coreset
    assert kept is not None
    table = {
        (name, ratio): Measured(name, ratio, -(-count // ratio), np.stack(each))
        for (name, ratio), each in errors.items()
    }
    return table, kept


def print_report(
    config: ml_collections.ConfigDict, passage: Passage, work: Workload, table: Table, cost: float
) -> None:
    """Print the table: geometric means over layers and heads, by method and ratio."""
    layers, heads, pairs, _ = work.keys.shape
    ratios = all_ratios(config)
    rows = []
    for name in NAMES:
        row = [METHODS[name].label]
        for ratio in ratios:
            error = geometric_mean(table[name, ratio].means)
            share = error / geometric_mean(table[REFERENCE, ratio].means)
            row += [f"{error:.4f}", f"{share:.2f}"]
        rows.append(row)
    print_table(
        f"Relative attention error, geometric mean over {layers} layers × {heads} heads: "
        f"{passage.name}, {pairs} pairs a head, {work.queries.shape[-2]} queries a head",
        ["method", *(header for ratio in ratios for header in (f"{ratio}×", "/ uniform"))],
        rows,
        left=("method",),
        caption=(
            f"n×: one pair in n is kept. / uniform: the error over that of uniform. Errors are "
            f"means over {len(config.seeds)} seed{'s'[: len(config.seeds) != 1]}.\n"
            f"The queries are those of the {config.query_bytes} bytes after the prefix; the model "
            f"spends {cost:.2f} bits a byte on the text.\n" + stamp(config.seeds)
        ),
    )


def write_lines(
    path: pathlib.Path, config: ml_collections.ConfigDict, source: cache_file.Source, table: Table
) -> None:
    """Write a JSON line for every method, ratio, layer and head, in place of an older file."""
    with results.replacing(path) as partial:
        store = results.Results(partial)
        shared = {
            "experiment": "compress_cache",
            "text": source.text_name,
            "text_sha256": source.text_sha256,
            "model_sha256": source.model_sha256,
            "pairs": source.length,
            "query_bytes": config.query_bytes,
            "seeds": config.seeds,
        }
        for (method, ratio), measured in table.items():
            reference = table[REFERENCE, ratio].means
            named = {**shared, "method": method, "ratio": ratio, "size": measured.size}
            for (layer, head), error in np.ndenumerate(measured.means):
                found = {
                    "relative_error": error,
                    "relative_error_by_seed": measured.errors[:, layer, head],
                    "over_uniform": error / reference[layer, head],
                }
                store.put({**named, "layer": layer, "head": head}, found)


def _megabytes(count: int) -> str:
    return f"{count:,} bytes ({count / 1e6:.1f} MB)"


def run(config: ml_collections.ConfigDict) -> Table:
    """Compress, measure, print, draw and keep; errors are those of `read_passage`."""
    passage = read_passage(config)
    checkpoint = lm.CHECKPOINT if config.checkpoint is None else pathlib.Path(config.checkpoint)
    model, _ = lm.load(checkpoint)
    logging.info("reading %d bytes of %s", passage.tokens.size, passage.name)
    bits_per_byte = lm.bits_per_byte(model, passage.tokens)
    work = workload(model, passage)
    layers, heads, pairs, width = work.keys.shape
    logging.info("%d layers, %d heads, %d pairs of width %d", layers, heads, pairs, width)
    table, coreset = measure(config, work)
    print_report(config, passage, work, table, bits_per_byte)

    output = pathlib.Path(config.output)
    source = cache_file.Source(
        text_name=passage.name,
        text_sha256=passage.sha256,
        length=passage.length,
        model_sha256=cache_file.sha256(checkpoint),
        method=OURS,
        ratio=config.ratio,
        seed=config.seeds[0],
    )
    names = "errors.jsonl", "errors.png", f"cache-{config.ratio}x.safetensors"
    lines, figure, cache = (output / name for name in names)
    write_lines(lines, config, source, table)
    title = f"{passage.name}, {passage.length} pairs a head"
    figures.save(figure, draw(table, config.ratio, title))
    cache_file.save(cache, cache_file.CompressedCache(coreset, source))

    full, kept = cache_file.num_bytes(work.keys, work.values), cache_file.num_bytes(*coreset)
    print(f"full cache        {_megabytes(full)}: keys and values")
    print(f"compressed, {f'{config.ratio}×:':<6}{_megabytes(kept)}: with log-weights and indices")
    for path in (lines, figure, cache):
        print(path)
    return table


if __name__ == "__main__":
    command.main(run, "configs/compress_cache.py", OSError, ValueError)
