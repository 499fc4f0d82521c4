"""Parameters of pretrained models on their way from a file into a `Llama`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from experiments.model.llama import Llama, LlamaConfig
from experiments.model.tokenizer import Tokenizer


class Stored(NamedTuple):
    """A parameter in a file.

    Attributes:
      shape: of the parameter as the model holds it.
      read: returns it, any float dtype.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class Checkpoint(NamedTuple):
    """What a file or folder holds, its tensors not yet read.

    Attributes:
      config: the shape of the model.
      stored: parameters by their path in the model, such as `blocks.0.attention.query.kernel`.
      tokenizer: text to tokens and back.
    """

    config: LlamaConfig
    stored: dict[str, Stored]
    tokenizer: Tokenizer


def build(config: LlamaConfig, stored: Mapping[str, Stored], dtype: DTypeLike, where: str) -> Llama:
    """Return a model of stored parameters.

    Args:
      config: the shape.
      stored: parameters by their path in the model, such as `blocks.0.attention.query.kernel`.
      dtype: see `Llama`.
      where: what holds them, for errors.

    Raises:
      ValueError: a parameter is missing, of another shape, or unknown to the model.
    """
    graph, state = nnx.split(
        nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(params=0)))
    )
    leaves = {".".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    expected = {name: leaf.shape for name, (_, leaf) in leaves.items()}
    found = {name: parameter.shape for name, parameter in stored.items()}
    if expected != found:
        raise ValueError(
            f"{where} does not hold a model of this shape: {differences(expected, found)}"
        )
    filled = [
        (path, leaf.replace(jnp.asarray(stored[name].read(), leaf.dtype)))
        for name, (path, leaf) in leaves.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def parameters(model: Llama) -> dict[str, np.ndarray]:
    """Return all parameters of a model by their path, in their own dtype."""
    flat: Any = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    """Name some tensors that are missing, unknown or of another shape."""
    missing = [f"{name} is missing" for name in expected.keys() - found.keys()]
    unknown = [f"{name} is unknown to it" for name in found.keys() - expected.keys()]
    reshaped = [
        f"{name} has shape {found[name]}, not {expected[name]}"
        for name in expected.keys() & found.keys()
        if expected[name] != found[name]
    ]
    complaints = sorted(missing) + sorted(unknown) + sorted(reshaped)
    more = f" and {len(complaints) - 4} more" if len(complaints) > 4 else ""
    return "; ".join(complaints[:4]) + more
