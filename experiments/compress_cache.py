r"""Compresses the KV cache of a real text and asks what the model asks next.

    python -m experiments.compress_cache --config=configs/compress_cache.py:demo
    python -m experiments.compress_cache --config=configs/compress_cache.py \
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
:func:`experiments.cache_file.load`.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import app, flags, logging
from jaxtyping import Array, Float, UInt8
from ml_collections import config_flags

import coreset_jax as cj
from experiments import cache_file, lm, results, text
from experiments.cache_figure import REFERENCE, Measured, Table, draw
from experiments.styles import STYLES

OURS = "fitted"
METHODS: dict[str, cj.Compressor] = {
    "uniform": cj.baselines.uniform(),
    "balance_kv": cj.baselines.balance_kv(),
    "balance_kv_corrected": cj.baselines.balance_kv(corrected=True),
    "balanced": cj.balanced(),
    "fitted": cj.fitted(),
}

# Where the config leaves the prefix to the file, each head keeps at least this many pairs.
_MIN_PAIRS = 16

# Pairs whose scores are held at a time: 64 MB of them for 8 heads with 1024 queries each.
_BLOCK_SIZE = 2048


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
    """Let the model read the passage, and answer its queries after the prefix exactly.

    Args:
      model: the model.
      passage: the text.
    """
    trace = lm.caches(model, passage.tokens)
    keys, values = (array[..., : passage.length, :] for array in (trace.keys, trace.values))
    # Query heads of a group are neighbours: they become rows of the head that they share.
    queries = trace.queries[..., passage.length :, :]
    queries = queries.reshape(*keys.shape[:2], -1, keys.shape[-1])
    exact = cj.attention(queries, keys, values, block_size=_BLOCK_SIZE)
    return Workload(keys, values, queries, exact)


@jax.jit
def relative_errors(
    queries: Float[Array, "*heads q d"], exact: Float[Array, "*heads q dv"], coreset: cj.Coreset
) -> Float[Array, "*heads"]:
    """Return each head's mean error over its queries, relative to the mean norm of its outputs.

    Args:
      queries: queries `[..., q, d]`.
      exact: what they should hear `[..., q, dv]`.
      coreset: what answers them.
    """
    outputs = cj.attend(queries, coreset, block_size=_BLOCK_SIZE)
    error = jnp.mean(jnp.linalg.norm(outputs - exact, axis=-1), axis=-1)
    return error / jnp.mean(jnp.linalg.norm(exact, axis=-1), axis=-1)


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
        for name in METHODS
        for seed in config.seeds
    ]
    kept: cj.Coreset | None = None
    errors: dict[tuple[str, int], list[np.ndarray]] = {}
    for ratio, name, seed in results.track(
        jobs, "compressing", label=lambda job: f"{job[0]}×, {STYLES[job[1]].label}, seed {job[2]}"
    ):
        coreset = METHODS[name](
            jax.random.key(seed), work.keys, work.values, size=-(-count // ratio)
        )
        error = np.asarray(relative_errors(work.queries, work.exact, coreset))
        errors.setdefault((name, ratio), []).append(error)
        if (ratio, name, seed) == (config.ratio, OURS, config.seeds[0]):
            kept = coreset
    assert kept is not None
    table = {
        (name, ratio): Measured(name, ratio, -(-count // ratio), np.stack(each))
        for (name, ratio), each in errors.items()
    }
    return table, kept


def geometric_mean(values: np.ndarray) -> float:
    """Return the geometric mean over all entries."""
    return float(np.exp(np.mean(np.log(values))))


def print_report(
    config: ml_collections.ConfigDict,
    passage: Passage,
    work: Workload,
    table: Table,
    bits_per_byte: float,
) -> None:
    """Print the table: geometric means over layers and heads, by method and ratio."""
    layers, heads, pairs, _ = work.keys.shape
    ratios = all_ratios(config)
    rows = []
    for name in METHODS:
        row = [STYLES[name].label]
        for ratio in ratios:
            error = geometric_mean(table[name, ratio].means)
            share = error / geometric_mean(table[REFERENCE, ratio].means)
            row += [f"{error:.4f}", f"{share:.2f}"]
        rows.append(row)
    results.print_table(
        f"Relative attention error, geometric mean over {layers} layers × {heads} heads: "
        f"{passage.name}, {pairs} pairs a head, {work.queries.shape[-2]} queries a head",
        ["method", *(header for ratio in ratios for header in (f"{ratio}×", "/ uniform"))],
        rows,
        left=("method",),
        caption=(
            f"n×: one pair in n is kept. / uniform: the error over that of uniform. Errors are "
            f"means over {len(config.seeds)} seed{'s'[: len(config.seeds) != 1]}.\n"
            f"The queries are those of the {config.query_bytes} bytes after the prefix; the model "
            f"spends {bits_per_byte:.2f} bits a byte on the text.\n"
            + results.stamp(", ".join(map(str, config.seeds)))
        ),
    )


def write_lines(
    path: pathlib.Path, config: ml_collections.ConfigDict, source: cache_file.Source, table: Table
) -> None:
    """Write a JSON line for every method, ratio, layer and head, in place of an older file."""
    with results.replacing(path) as partial:
        store = results.Results(partial)
        for measured in table.values():
            reference = table[REFERENCE, measured.ratio].means
            for (layer, head), error in np.ndenumerate(measured.means):
                store.put(
                    {
                        "experiment": "compress_cache",
                        "text": source.text_name,
                        "text_sha256": source.text_sha256,
                        "model_sha256": source.model_sha256,
                        "pairs": source.length,
                        "query_bytes": config.query_bytes,
                        "seeds": config.seeds,
                        "method": measured.method,
                        "ratio": measured.ratio,
                        "size": measured.size,
                        "layer": layer,
                        "head": head,
                    },
                    {
                        "relative_error": error,
                        "relative_error_by_seed": measured.errors[:, layer, head],
                        "over_uniform": error / reference[layer, head],
                    },
                )


def _megabytes(count: int) -> str:
    return f"{count:,} bytes ({count / 1e6:.1f} MB)"


def run(config: ml_collections.ConfigDict, passage: Passage) -> Table:
    """Do the whole job: compress, measure, print, draw and keep.

    Args:
      config: as in `configs/compress_cache.py`.
      passage: the text, from `read_passage`.

    Returns:
      What was measured, by method and ratio.
    """
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
    lines, figure, cache = (
        output / name
        for name in ("errors.jsonl", "errors.png", f"cache-{config.ratio}x.safetensors")
    )
    write_lines(lines, config, source, table)
    with results.replacing(figure) as partial:
        draw(table, config.ratio, f"{passage.name}, {passage.length} pairs a head").savefig(partial)
    cache_file.save(cache, cache_file.CompressedCache(coreset, source))

    full, kept = cache_file.num_bytes(work.keys, work.values), cache_file.num_bytes(*coreset)
    print(f"full cache        {_megabytes(full)}: keys and values")
    print(f"compressed, {f'{config.ratio}×:':<6}{_megabytes(kept)}: with log-weights and indices")
    for path in (lines, figure, cache):
        print(path)
    return table


def main(arguments: Sequence[str]) -> None:
    """Does the job that the flags describe."""
    if len(arguments) > 1:
        raise app.UsageError(f"unexpected arguments {arguments[1:]}")
    results.start_logging()
    config = flags.FLAGS.config
    try:
        passage = read_passage(config)
    except (OSError, ValueError) as error:
        sys.exit(f"compress_cache: {error}")
    run(config, passage)


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/compress_cache.py")
    app.run(main)
