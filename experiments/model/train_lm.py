"""Train the language model of the experiments on the source of Python's standard library.

    python -m experiments.model.train_lm --config=configs/train_lm.py --output=/tmp/train_lm
    python -m experiments.model.train_lm --evaluate=2048

An interrupted run goes on where its last checkpoint stands: batches are a function of (seed, step)
alone and the checkpoint holds the optimizer too. `<output>/model.safetensors` is what
`experiments.model.lm.load` reads. The second command trains nothing: it reads the held-out files by
the shipped checkpoint, in windows of so many bytes.
"""

from __future__ import annotations

import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags, logging
from flax import nnx
from jaxtyping import Array

from experiments.common import command
from experiments.model import decoder, lm, text
from experiments.model.training import (
    DOT_GENERALS,
    Phase,
    TrainState,
    batch_at,
    make_optimizer,
    make_step,
    read_checkpoint,
    write_checkpoint,
)

_OUTPUT = flags.DEFINE_string("output", "/tmp/train_lm", "folder for checkpoints, log and model")
_UNTIL = flags.DEFINE_integer("until", None, "stop after this many steps, behind a checkpoint")
_EVALUATE = flags.DEFINE_integer(
    "evaluate",
    None,
    "train nothing; read the held-out files by the shipped model, in windows of this many bytes",
)


def train(
    config: ml_collections.ConfigDict, output: pathlib.Path, until: int | None = None
) -> decoder.Decoder:
    """Train, or go on training, and export the model.

    Args:
      config: see `configs/train_lm.py`.
      output: folder for `state.safetensors`, `log.jsonl` and `model.safetensors`; made if missing.
      until: stop after this many steps in all, behind a checkpoint; all phases by default.

    Returns:
      The model as it stands, float32.

    Raises:
      ValueError: the config contradicts itself, or `output` holds a run of another config.
    """
    output.mkdir(parents=True, exist_ok=True)
    phases = [Phase(*phase) for phase in config.phases]
    total = sum(phase.steps for phase in phases)
    last = total if until is None else min(until, total)
    if config.matmul_dtype not in DOT_GENERALS:
        raise ValueError(
            f"matmul_dtype must be one of {sorted(DOT_GENERALS)}, got {config.matmul_dtype!r}"
        )
    model_config = decoder.ModelConfig(**config.model)
    model = decoder.Decoder(
        model_config,
        dot_general=DOT_GENERALS[config.matmul_dtype],
        rngs=nnx.Rngs(params=config.seed),
    )
    graph, parameters = nnx.split(model)
    if config.start:
        started, started_config = lm.load(config.start)
        if started_config != model_config:
            raise ValueError(f"{config.start} holds another model than config.model describes")
        parameters = nnx.state(started)
    # The same model with float32 products: what is evaluated and exported is what will be used.
    exact_graph = nnx.graphdef(
        nnx.eval_shape(lambda: decoder.Decoder(model_config, rngs=nnx.Rngs(params=0)))
    )
    optimizer = make_optimizer(config)
    state = TrainState(jnp.zeros((), jnp.int32), parameters, optimizer.init(parameters))
    checkpoint = output / "state.safetensors"
    if checkpoint.exists():
        state = read_checkpoint(checkpoint, state)
        logging.info("resumed at step %d from %s", int(state.step), checkpoint)
    records = _records_until(output / "log.jsonl", int(state.step))
    stream, heldout = text.stream("train"), text.stream("heldout")
    sample = text.windows(heldout, config.evaluation_windows, config.evaluation_width)
    sizes = lm.parameter_count(model), stream.size, heldout.size, total
    logging.info("%d parameters, %d training bytes, %d held-out bytes, %d steps", *sizes)

    def exact() -> decoder.Decoder:
        return nnx.merge(exact_graph, state.parameters)

    def export(step: int, metadata: dict[str, str]) -> decoder.Decoder:
        read = sum(phase.batch * phase.length * steps for phase, steps in _progress(phases, step))
        if config.start:
            read += int(lm.metadata(config.start)["bytes_read"])
        header = {"seed": str(config.seed), "step": str(step), "bytes_read": str(read), **metadata}
        lm.save(output / "model.safetensors", exact(), model_config, header)
        return exact()

    update = make_step(graph, optimizer)
    losses: list[Array] = []
    began = window_began = time.monotonic()
    before = records[-1]["elapsed"] if records else 0.0
    window_bytes = 0
    with (output / "log.jsonl").open("w", encoding="utf-8") as log:
        log.writelines(json.dumps(record) + "\n" for record in records)
        for index in range(int(state.step), last):
            batch = batch_at(stream, phases, config.seed, index, config.repeats)
            state, loss = update(state, jnp.asarray(batch))
            losses.append(loss)
            window_bytes += batch.shape[0] * (batch.shape[1] - 1)
            step = index + 1
            if step % config.checkpoint_every == 0 or step == last:
                write_checkpoint(checkpoint, state)
                export(step, {})
            evaluates = step % config.evaluate_every == 0 or step == last
            if not evaluates and step % config.log_every != 0:
                continue
            record: dict[str, Any] = {
                "step": step,
                "length": batch.shape[1] - 1,
                "bits_per_byte": float(np.mean([float(each) for each in losses])),
                "bytes_per_second": window_bytes / (time.monotonic() - window_began),
            }
            if evaluates:
                record["heldout_bits_per_byte"] = lm.bits_per_byte(exact(), sample)
            record["elapsed"] = before + time.monotonic() - began
            log.write(json.dumps(record) + "\n")
            log.flush()
            logging.info("%s", _line(record, total))
            losses.clear()
            window_began, window_bytes = time.monotonic(), 0
    if last < total:
        return exact()
    width = config.heldout_window
    bits = lm.stream_bits_per_byte(exact(), heldout[: config.heldout_bytes], width)
    logging.info("held-out files, in windows of %d bytes: %.4f bits/byte", width, bits)
    return export(total, {"heldout_bits_per_byte": f"{bits:.4f}", "heldout_window": str(width)})


def _records_until(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
    # Records behind the last checkpoint belong to steps that will be run again.
    if not path.exists():
        return []
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [record for record in records if record["step"] <= step]


def _progress(phases: Sequence[Phase], step: int) -> list[tuple[Phase, int]]:
    done = []
    for phase in phases:
        done.append((phase, min(step, phase.steps)))
        step -= done[-1][1]
    return done


def _line(record: dict[str, Any], total: int) -> str:
    line = (
        f"step {record['step']:>6}/{total}  length {record['length']:>5}  "
        f"{record['bits_per_byte']:.4f} bits/byte  {record['bytes_per_second']:>7.0f} bytes/s  "
        f"{record['elapsed']:>7.0f} s"
    )
    if "heldout_bits_per_byte" in record:
        line += f"  held out {record['heldout_bits_per_byte']:.4f} bits/byte"
    return line


def run(config: ml_collections.ConfigDict) -> None:
    """Train or evaluate, as the flags say."""
    if (width := _EVALUATE.value) is None:
        train(config, pathlib.Path(_OUTPUT.value), _UNTIL.value)
        return
    bits = lm.stream_bits_per_byte(lm.load()[0], text.stream("heldout"), width)
    logging.info("held-out files, in windows of %d bytes: %.4f bits/byte", width, bits)


if __name__ == "__main__":
    command.main(run, "configs/train_lm.py")
