"""Llama and its relatives against the same in NumPy and float64, and step by step."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments.model import checkpoint, decoding, llama, lm
from tests.experiments.model.tiny_llama import CONFIGS, PLAIN, logits, tiny

TOKENS = np.random.default_rng(1).integers(0, PLAIN.vocabulary, 150)


@nnx.jit
def answered(model: llama.Llama, tokens: np.ndarray) -> jax.Array:
    return model(tokens)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_logit_is_that_of_float64(name: str) -> None:
    config = CONFIGS[name]
    model = tiny(config)
    expected = logits(config, checkpoint.parameters(model), TOKENS)
    assert np.std(expected) > 0.5
    found = answered(model, TOKENS[None])
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-4 * np.std(expected))


def test_every_option_changes_the_logits() -> None:
    parameters = checkpoint.parameters(tiny(CONFIGS["llama"]))
    plain = logits(PLAIN, parameters, TOKENS)
    for name in ("linear", "llama3"):
        assert np.abs(logits(CONFIGS[name], parameters, TOKENS) - plain).max() > 0.1
    for name in ("qwen2", "qwen3"):
        extra = checkpoint.parameters(tiny(CONFIGS[name])).keys() - parameters.keys()
        assert len(extra) == PLAIN.num_layers * {"qwen2": 3, "qwen3": 2}[name]


def test_bfloat16_is_close_and_answers_in_float32() -> None:
    found = answered(tiny(PLAIN, dtype="bfloat16"), TOKENS[None])
    assert found.dtype == jnp.float32
    expected = logits(PLAIN, checkpoint.parameters(tiny(PLAIN)), TOKENS)
    error = np.sqrt(np.mean((np.asarray(found[0]) - expected) ** 2))
    assert 0 < error < 0.05 * np.std(expected)


def test_blocks_are_one_program() -> None:
    graphs = [nnx.graphdef(block) for block in tiny(CONFIGS["qwen3"]).blocks]
    assert len(set(graphs)) == 1


@pytest.mark.slow
def test_step_by_step_is_the_whole_pass() -> None:
    model = tiny(PLAIN)
    expected = logits(PLAIN, checkpoint.parameters(model), TOKENS[:60])
    caches = decoding.prefilled(decoding.read_prompt(model, TOKENS[None, :40]), None, 20)
    found = []
    for token in TOKENS[40:60]:
        each, caches = decoding.step(model, caches, jnp.asarray([[token]]))
        found.append(each[0, 0])
    np.testing.assert_allclose(found, expected[40:], rtol=0, atol=1e-4 * np.std(expected))


@pytest.mark.slow
def test_from_an_empty_cache_as_well() -> None:
    model = tiny(PLAIN)
    caches = decoding.empty(PLAIN, 1, None, 60)
    costs = decoding.costs(model, caches, TOKENS[None, :60], piece=20)
    expected = logits(PLAIN, checkpoint.parameters(model), TOKENS[:60])
    expected -= np.log(np.exp(expected).sum(axis=-1, keepdims=True))
    bits = -expected[np.arange(59), TOKENS[1:60]] / math.log(2)
    np.testing.assert_allclose(costs[0], bits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(lm.byte_costs(model, TOKENS[:60]), bits, rtol=1e-4, atol=1e-4)


def test_divisors_of_llama3_by_wavelengths() -> None:
    factor, low, high, original, base, width = 8.0, 1.0, 4.0, 8192, 500_000.0, 128
    found = llama.llama3_divisors(width, base, factor, low, high, original)
    for place, divisor in enumerate(found):
        wavelength = 2 * math.pi * base ** (2 * place / width)
        if wavelength < original / high:
            assert divisor == 1
        elif wavelength > original / low:
            assert divisor == pytest.approx(factor)
        else:
            share = (original / wavelength - low) / (high - low)
            assert 1 / divisor == pytest.approx((1 - share) / factor + share)
    assert any(1 < divisor < factor for divisor in found)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_layers": 0}, "num_layers must be positive"),
        ({"norm_epsilon": 0.0}, "norm_epsilon must be positive"),
        ({"num_kv_heads": 4}, "num_query_heads must be a multiple"),
        ({"head_dim": 15}, "head_dim must be even"),
        ({"rope_divisors": (1.0,) * 7}, "rope_divisors must be 8"),
        ({"rope_divisors": (1.0,) * 7 + (0.0,)}, "rope_divisors must be positive"),
    ],
)
def test_configs_are_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(PLAIN, **changed)


def test_inputs_are_refused() -> None:
    model = tiny(PLAIN)
    with pytest.raises(ValueError, match="context of 400"):
        model(np.zeros((1, 401), np.int32))
    with pytest.raises(ValueError, match="integers"):
        model(np.zeros((1, 4)))
    with pytest.raises(ValueError, match="high must be above low"):
        llama.llama3_divisors(16, 1e4, factor=8, low=4, high=4, original=100)
    with pytest.raises(ValueError, match=r"dtype must be one of .* got float16"):
        llama.Llama(PLAIN, dtype=jnp.float16, rngs=nnx.Rngs(params=0))


def test_parameters_that_do_not_fit_are_named() -> None:
    arrays = checkpoint.parameters(tiny(PLAIN))
    stored = {
        name: checkpoint.Stored(array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    stored["rest"] = stored.pop("final_norm.scale")
    stored["head.kernel"] = checkpoint.Stored((64, 5), lambda: np.zeros((64, 5)))
    with pytest.raises(ValueError, match="file does not") as caught:
        checkpoint.build(PLAIN, stored, jnp.float32, "file")
    for words in ("final_norm.scale is missing", "rest is unknown", "not (64, 300)"):
        assert words in str(caught.value)
