"""Training of the language model: schedule, optimizer, batches, steps and checkpoints."""

from __future__ import annotations

import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import safetensors.numpy
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from experiments.common import results
from experiments.model import decoder, lm

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


DOT_GENERALS: dict[str, decoder.DotGeneral] = {
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
    with results.replacing(path) as partial:
        safetensors.numpy.save_file(tensors, partial)


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
    lm.check_shapes(f"{path} was written for another config", expected, tensors)
    return jax.tree.unflatten(
        structure, [jnp.asarray(tensors[jax.tree_util.keystr(key)]) for key, _ in leaves]
    )
