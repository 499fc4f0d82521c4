r"""What the caches of a pretrained model are like, layer by layer and head by head.

    python -m experiments.questions.calibration
    python -m experiments.questions.calibration --config.model=PATH

The model reads a text. Of every key-value head are measured, with the queries of the text moved to
where the next tokens will stand (`coreset_jax.queries.ahead`):

- the radius :math:`\rho` of unit queries about zero and about their mean: what can be promised of a
  coreset falls like :math:`e^{-\rho}`;
- the norm of the mean query over the root mean square norm of the queries;
- the standard deviation of the scores that a query gives the pairs, in the mean over queries;
- directions that the queries take about their mean, and the share of the pairs that has 90 % of
  the attention;
- the attention of the first token, the sink;
- the pairs that it gets of one budget over all heads, over the mean.

In ``<output>`` are ``calibration.jsonl``, a line for every head, and ``calibration.png``.
"""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.figure
import ml_collections
import numpy as np
from absl import logging
from jaxtyping import Array, Float

import coreset_jax as cj
from coreset_jax._src.precision import matmul
from experiments.common import command, figures, results
from experiments.common.tables import print_table, stamp
from experiments.model import pretrained
from experiments.questions import documents, texts
from experiments.questions.entrants import EVERY_HEAD

_QUERIES_AT_ONCE = 128

# Up to this radius bounds on the worst query say something.
_CERTIFIED = 4.0


class Quantity(NamedTuple):
    """Something that is measured of every head.

    Attributes:
      name: in files.
      column: in the table.
      label: in the figure.
      digits: behind the point.
    """

    name: str
    column: str
    label: str
    digits: int


QUANTITIES = (
    Quantity("rho", "ρ", "ρ about zero", 1),
    Quantity("centered_rho", "ρ, centered", "ρ about\nthe mean query", 1),
    Quantity("mean_query", "mean query", "norm of the\nmean query, relative", 2),
    Quantity("spread", "σ of scores", "standard deviation\nof scores", 2),
    Quantity("directions", "directions", "directions\nof the queries", 1),
    Quantity("dominating", "90 % in", "share of pairs with\n90 % of attention", 3),
    Quantity("sink", "sink", "attention of\nthe first token", 2),
    Quantity("budget", "budget", "pairs of one budget,\nover the mean", 2),
)


@jax.jit
def _scores(
    keys: Float[Array, "heads n d"], queries: Float[Array, "heads q d"]
) -> tuple[Float[Array, " heads"], Float[Array, " heads"]]:
    """The standard deviation of scores over pairs, and the attention of the first one."""

    def head(pair: tuple[Array, Array]) -> tuple[Array, Array]:
        keys, queries = pair

        def of(query: Array) -> tuple[Array, Array]:
            scores = matmul(keys, query) * keys.shape[-1] ** -0.5
            return jnp.std(scores), jax.nn.softmax(scores)[0]

        spreads, sinks = jax.lax.map(of, queries, batch_size=_QUERIES_AT_ONCE)
        return jnp.mean(spreads), jnp.mean(sinks)

    return jax.lax.map(head, (keys, queries))


def measure(document: documents.Document, *, ratio: int, seed: int) -> dict[str, np.ndarray]:
    """Everything in `QUANTITIES` of all heads, `[layers, kv_heads]` each."""
    keys, queries = document.keys[..., : document.length, :], document.ahead.queries
    calibration = cj.geometry.calibrate(keys, queries)
    mean = jnp.linalg.norm(calibration.query_center, axis=-1)
    square = jnp.mean(jnp.sum(jnp.square(queries), axis=-1), axis=-1)
    together = (each.reshape(-1, *each.shape[2:]) for each in (keys, queries))
    spread, sink = (each.reshape(keys.shape[:2]) for each in _scores(*together))
    compressor = cj.attended(axes=EVERY_HEAD)
    coreset = document.compressed(compressor, "ahead", ratio=ratio, seed=seed)
    kept = jnp.sum(coreset.log_weights > -jnp.inf, axis=-1)
    found = {
        "rho": calibration.rho,
        "centered_rho": calibration.centered_rho,
        "mean_query": mean / jnp.sqrt(square),
        "spread": spread,
        "directions": calibration.directions,
        "dominating": calibration.dominating,
        "sink": sink,
        "budget": kept / jnp.mean(kept),
    }
    return {name: np.asarray(each) for name, each in found.items()}


def print_heads(found: dict[str, np.ndarray], caption: str) -> None:
    """Print the medians over all heads, their ranges, and means over the heads of each layer."""
    rows: list[list[str] | None] = []
    for title, summary in (
        ("median", np.median),
        ("smallest", np.min),
        ("largest", np.max),
    ):
        rows.append([title, *(f"{summary(found[name]):.{n}f}" for name, _, _, n in QUANTITIES)])
    rows.append(None)
    rows += [
        [str(layer), *(f"{np.mean(found[name][layer]):.{n}f}" for name, _, _, n in QUANTITIES)]
        for layer in range(len(found["rho"]))
    ]
    print_table(
        "Heads of the model: of all of them, then the mean of each layer",
        ["layer", *(each.column for each in QUANTITIES)],
        rows,
        left=("layer",),
        caption=caption,
    )
    heads = found["rho"].size
    zero, mean = (int(np.sum(found[name] <= _CERTIFIED)) for name in ("rho", "centered_rho"))
    print(
        f"Heads whose errors can be certified (ρ up to {_CERTIFIED:g}): {zero} of {heads} for "
        f"queries about zero, {mean} for queries about their mean."
    )


def draw(found: dict[str, np.ndarray]) -> matplotlib.figure.Figure:
    """A heat map of every quantity, layers downwards and heads across."""
    layers, heads = found["rho"].shape
    figure = figures.new(11.0, 2.2 + 0.11 * layers)
    for axes, (name, _, label, _) in zip(
        figure.subplots(1, len(QUANTITIES)), QUANTITIES, strict=True
    ):
        image = axes.imshow(found[name], cmap="viridis_r", aspect="auto", interpolation="nearest")
        bar = figure.colorbar(image, ax=axes, location="bottom", pad=0.02)
        bar.ax.tick_params(labelsize=7)
        axes.set_title(label, fontsize=8)
        axes.set_xticks(range(heads), map(str, range(heads)), fontsize=7)
        axes.set_xlabel("head", fontsize=8)
        axes.set_yticks(range(0, layers, 5) if axes is figure.axes[0] else [])
    figure.axes[0].set_ylabel("layer")
    return figure


def run(config: ml_collections.ConfigDict) -> dict[str, np.ndarray]:
    """Measure, print and draw.

    Raises:
      ValueError: the configuration makes no sense.
    """
    if config.ratio < 2:
        raise ValueError(f"ratio must be at least 2, got {config.ratio}")
    if config.passage_tokens < 64:
        raise ValueError(f"passage_tokens must be at least 64, got {config.passage_tokens}")
    model = pretrained.load(config.model, config.dtype)
    tokens = texts.passage(
        config.kind, config.split, config.passage, config.passage_tokens, model.tokenizer
    )
    logging.info("reading %d tokens", len(tokens))
    document = documents.read(model, tokens.tolist(), reconstruct=False)
    logging.info("measuring %d heads", document.keys.shape[0] * document.keys.shape[1])
    found = measure(document, ratio=config.ratio, seed=config.seed)
    caption = f"{config.kind}, {document.length} tokens; one budget at {config.ratio}×.\n" + stamp(
        config.seed
    )
    print_heads(found, caption)
    output = pathlib.Path(config.output)
    store = results.Results(output / "calibration.jsonl", fresh=True)
    names = ("model", "dtype", "kind", "split", "passage", "passage_tokens", "ratio", "seed")
    settings = {name: config[name] for name in names}
    for layer, head in np.ndindex(*found["rho"].shape):
        values = {name: float(each[layer, head]) for name, each in found.items()}
        store.put(settings | {"layer": layer, "head": head}, values)
    figures.save(output / "calibration.png", draw(found))
    print(output / "calibration.jsonl")
    print(output / "calibration.png")
    return found


if __name__ == "__main__":
    command.main(run, "configs/calibration.py", OSError, ValueError, ModuleNotFoundError)
