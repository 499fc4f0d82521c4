"""Train the language model of the experiments on the source of Python's standard library.

    python -m experiments.train_lm --config=configs/train_lm.py --output=/tmp/train_lm
    python -m experiments.train_lm --evaluate=2048

An interrupted run goes on where its last checkpoint stands: batches are a function of (seed, step)
alone and the checkpoint holds the optimizer too. `<output>/model.safetensors` is what
`experiments.lm.load` reads. The second command trains nothing: it reads the held-out files by the
shipped checkpoint, in windows of so many bytes.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import safetensors
import safetensors.numpy
from absl import app, flags, logging
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import config_flags

from experiments import decoder, lm, text

_OUTPUT = flags.DEFINE_string("output", "/tmp/train_lm", "folder for checkpoints, log and model")
_UNTIL = flags.DEFINE_integer("until", None, "stop after this many steps, behind a checkpoint")
_EVALUATE = flags.DEFINE_integer(
    "evaluate",
    None,
    "train nothing; read the held-out files by the shipped model, in windows of this many bytes",
)


Parameters = nnx.State[Any, Any]


class Phase(NamedTuple):
    """A stretch of training with one batch shape."""

    steps: int
    batch: int
    length: int


class TrainState(NamedTuple):
    """All that a step changes: a pytree."""

    step: Int[Array, ""]
    parameters: Parameters
    optimizer: optax.OptState


def learning_rate_factor(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Return the warmup-stable-decay schedule, between 0 and 1, that both optimizers share."""
    total = sum(steps for steps, _, _ in config.phases)
    if not config.warmup_steps < config.decay_start < total:
        raise ValueError(
            "decay_start must lie between warmup_steps and the total of the phases, got "
            f"{config.warmup_steps} < {config.decay_start} < {total}"
        )
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, config.warmup_steps),
            optax.constant_schedule(1.0),
            optax.linear_schedule(1.0, 0.0, total - config.decay_start),
        ],
        [config.warmup_steps, config.decay_start],
    )


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """Muon for the matrices of the MLPs, AdamW for everything else.

    Muon's updates are orthogonal: attention projections trained by it stay of full rank, and the
    keys and values with them, unlike those of models trained by AdamW.
    """
    factor = learning_rate_factor(config)

    def dimension_numbers(parameters: Any) -> Any:
        def of(path: tuple[Any, ...], leaf: Array) -> Any:
            inside = "mlp" in jax.tree_util.keystr(path) and leaf.ndim == 2
            return optax.contrib.MuonDimensionNumbers() if inside else None

        return jax.tree_util.tree_map_with_path(of, parameters)

    return optax.chain(
        optax.clip_by_global_norm(config.max_gradient_norm),
        optax.contrib.muon(
            lambda count: config.muon_learning_rate * factor(count),
            adam_learning_rate=lambda count: config.adam_learning_rate * factor(count),
            adam_b2=0.99,
            adam_weight_decay=config.adam_weight_decay,
            muon_weight_dimension_numbers=dimension_numbers,
        ),
    )


def batch_at(
    stream: UInt8[np.ndarray, " bytes"],
    phases: Sequence[Phase],
    seed: int,
    step: int,
    repeats: int = 0,
) -> UInt8[np.ndarray, "batch width"]:
    """Return the batch of a step, a function of the arguments alone.

    Within a phase the stream is cut into windows that are visited in random order, each once an
    epoch; the cuts move from epoch to epoch.

    Args:
      stream: the training bytes.
      phases: the phases in order.
      seed: any integer.
      step: 0-based, below the sum of all steps.
      repeats: passages of every window that say again what stood earlier in it, at any distance.

    Returns:
      uint8 `[batch, length + 1]`: inputs and, shifted by one, targets.
    """
    index = 0
    while index < len(phases) and step >= phases[index].steps:
        step -= phases[index].steps
        index += 1
    if step < 0 or index == len(phases):
        raise ValueError(f"step must be at least 0 and below the total of {tuple(phases)}")
    phase = phases[index]
    count = (stream.size - 1) // phase.length - 1  # One less: room for the moving cuts.
    if count < 1:
        raise ValueError(
            f"stream of {stream.size} bytes is too short for windows of {phase.length}"
        )
    rows = []
    for sequence in range(step * phase.batch, (step + 1) * phase.batch):
        epoch, position = divmod(sequence, count)
        offset, order = _epoch_order(seed, index, epoch, count, phase.length)
        start = offset + int(order[position]) * phase.length
        row = stream[start : start + phase.length + 1]
        rows.append(_with_repeats(row, repeats, np.random.default_rng((seed, index, sequence))))
    return np.stack(rows)


def _with_repeats(
    row: UInt8[np.ndarray, " width"], repeats: int, random: np.random.Generator
) -> UInt8[np.ndarray, " width"]:
    row = row.copy()
    for _ in range(repeats):
        # Long enough to be noticed, short enough to leave most of the window as it was.
        length = int(random.integers(64, max(65, row.size // (4 * repeats))))
        target = int(random.integers(length, row.size - length))
        source = int(random.integers(0, target - length + 1))
        row[target : target + length] = row[source : source + length]
    return row


@functools.lru_cache(maxsize=4)
def _epoch_order(
    seed: int, phase: int, epoch: int, count: int, length: int
) -> tuple[int, Int[np.ndarray, " count"]]:
    random = np.random.default_rng((seed, phase, epoch))
    return int(random.integers(length)), random.permutation(count)


@jax.custom_vjp
def _bfloat16_product(
    x: Float[Array, "rows inner"], kernel: Float[Array, "inner columns"]
) -> Float[Array, "rows columns"]:
    return jnp.matmul(
        x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )


def _bfloat16_product_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _bfloat16_product(x, kernel), (x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16))


def _bfloat16_product_backward(saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, kernel = saved
    grad = grad.astype(jnp.bfloat16)
    return (
        jnp.matmul(grad, kernel.T, preferred_element_type=jnp.float32),
        jnp.matmul(x.T, grad, preferred_element_type=jnp.float32),
    )


_bfloat16_product.defvjp(_bfloat16_product_forward, _bfloat16_product_backward)


def bfloat16_dot_general(
    x: Float[Array, "*lead inner"],
    kernel: Float[Array, "inner columns"],
    dimension_numbers: Any,
    **unused: Any,
) -> Float[Array, "*lead columns"]:
    """Multiply as `nnx.Linear` asks, with bfloat16 factors and float32 sums, gradients included.

    On CPUs only this combination reaches the AVX512-BF16 units: a bfloat16 result, or the float32
    gradient that `preferred_element_type` alone would bring back, falls to the float32 kernels.
    """
    del unused
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(
            f"dimension_numbers must contract last with first, got {dimension_numbers}"
        )
    product = _bfloat16_product(x.reshape(-1, x.shape[-1]), kernel)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


_DOT_GENERALS: dict[str, decoder.DotGeneral] = {
    "float32": jax.lax.dot_general,
    "bfloat16": bfloat16_dot_general,
}


def make_step(
    graph: nnx.GraphDef[decoder.Decoder], optimizer: optax.GradientTransformation
) -> Callable[[TrainState, UInt8[Array, "batch width"]], tuple[TrainState, Float[Array, ""]]]:
    """Return the compiled step: `(state, batch) -> (state, bits per byte of the batch)`."""

    def loss(parameters: Parameters, batch: Int[Array, "batch width"]) -> Float[Array, ""]:
        logits = nnx.merge(graph, parameters)(batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: UInt8[Array, "batch width"]) -> tuple[TrainState, Array]:
        value, gradients = jax.value_and_grad(loss)(state.parameters, batch.astype(jnp.int32))
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, updates)
        return TrainState(state.step + 1, parameters, optimizer_state), value / math.log(2)

    return step


def write_checkpoint(path: pathlib.Path, state: TrainState) -> None:
    """Write the whole state; a reader sees the old file or the new one, never a part."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    tensors = {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in leaves}
    lm.write_atomically(path, safetensors.numpy.save(tensors))


def read_checkpoint(path: pathlib.Path, like: TrainState) -> TrainState:
    """Read a state written by `write_checkpoint`.

    Args:
      path: the file.
      like: a state of the same structure.

    Returns:
      The state, bit for bit.

    Raises:
      ValueError: the file holds other tensors or other shapes than `like`.
    """
    tensors = safetensors.numpy.load_file(path)
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    expected = {jax.tree_util.keystr(key): np.shape(leaf) for key, leaf in leaves}
    found = {key: value.shape for key, value in tensors.items()}
    if expected != found:
        differing = sorted(set(expected.items()) ^ set(found.items()))
        raise ValueError(
            f"{path} was written for another config; differing tensors: {differing[:4]}"
        )
    return jax.tree.unflatten(
        structure, [jnp.asarray(tensors[jax.tree_util.keystr(key)]) for key, _ in leaves]
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
    if config.matmul_dtype not in _DOT_GENERALS:
        raise ValueError(
            f"matmul_dtype must be one of {sorted(_DOT_GENERALS)}, got {config.matmul_dtype!r}"
        )
    model_config = decoder.ModelConfig(**config.model)
    model = decoder.Decoder(
        model_config,
        dot_general=_DOT_GENERALS[config.matmul_dtype],
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
    logging.info(
        "%d parameters, %d training bytes, %d held-out bytes, %d steps",
        lm.parameter_count(model),
        stream.size,
        heldout.size,
        total,
    )

    def export(step: int, metadata: dict[str, str]) -> decoder.Decoder:
        exact = nnx.merge(exact_graph, state.parameters)
        read = sum(phase.batch * phase.length * steps for phase, steps in _progress(phases, step))
        if config.start:
            read += int(lm.metadata(config.start)["bytes_read"])
        lm.save(
            output / "model.safetensors",
            exact,
            model_config,
            {"seed": str(config.seed), "step": str(step), "bytes_read": str(read), **metadata},
        )
        return exact

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
                exact = nnx.merge(exact_graph, state.parameters)
                record["heldout_bits_per_byte"] = lm.bits_per_byte(exact, sample)
            record["elapsed"] = before + time.monotonic() - began
            log.write(json.dumps(record) + "\n")
            log.flush()
            logging.info("%s", _line(record, total))
            losses.clear()
            window_began, window_bytes = time.monotonic(), 0
    if last < total:
        return nnx.merge(exact_graph, state.parameters)
    width = config.heldout_window
    bits = lm.stream_bits_per_byte(
        nnx.merge(exact_graph, state.parameters), heldout[: config.heldout_bytes], width
    )
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


def main(argv: Sequence[str]) -> None:
    """Train or evaluate, as the flags say."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if (width := _EVALUATE.value) is not None:
        bits = lm.stream_bits_per_byte(lm.load()[0], text.stream("heldout"), width)
        logging.info("held-out files, in windows of %d bytes: %.4f bits/byte", width, bits)
        return
    train(flags.FLAGS.config, pathlib.Path(_OUTPUT.value), _UNTIL.value)


if __name__ == "__main__":
    # Here and not above: another experiment in the same process has a flag of this name.
    config_flags.DEFINE_config_file("config", "configs/train_lm.py")
    sys.exit(app.run(main))
