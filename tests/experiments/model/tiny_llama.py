"""Small models with random weights, and the forward pass once more in NumPy and float64."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.model import checkpoint
from experiments.model.llama import Llama, LlamaConfig, linear_divisors, llama3_divisors

PLAIN = LlamaConfig(
    num_layers=2,
    embed_dim=64,
    num_query_heads=6,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=96,
    vocabulary=300,
    context_length=400,
    rope_base=10_000.0,
)
CONFIGS = {
    "llama": PLAIN,
    "tied": dataclasses.replace(PLAIN, tied_embeddings=True),
    "qwen2": dataclasses.replace(PLAIN, attention_bias=True, norm_epsilon=1e-3),
    "qwen3": dataclasses.replace(PLAIN, qk_norm=True, tied_embeddings=True),
    "linear": dataclasses.replace(PLAIN, rope_divisors=linear_divisors(16, 4.0)),
    "llama3": dataclasses.replace(
        PLAIN, rope_divisors=llama3_divisors(16, 1e4, factor=8, low=1, high=4, original=100)
    ),
    "ungrouped": dataclasses.replace(PLAIN, num_kv_heads=6, rope_base=500.0),
}


def tiny(config: LlamaConfig, seed: int = 0, dtype: str = "float32") -> Llama:
    """A model whose norms and biases are random as well."""
    generator = np.random.default_rng(seed)
    fresh = Llama(config, rngs=nnx.Rngs(params=0))
    stored = {}
    for name, array in checkpoint.parameters(fresh).items():
        noise = generator.standard_normal(array.shape).astype(np.float32)
        if name.endswith("scale"):
            noise = 1 + 0.3 * noise
        elif name.endswith("kernel"):
            noise *= 1.5 / math.sqrt(array.shape[0])
        stored[name] = checkpoint.Stored(array.shape, lambda noise=noise: noise)
    return checkpoint.build(config, stored, jnp.dtype(dtype), "noise")


def logits(config: LlamaConfig, parameters: Mapping[str, np.ndarray], tokens: np.ndarray):
    """The logits `[length, vocabulary]`, float64, a head at a time."""
    weights = {name: np.asarray(array, np.float64) for name, array in parameters.items()}
    length, width = len(tokens), config.head_dim

    def norm(x, name):
        mean = np.mean(x**2, axis=-1, keepdims=True)
        return x / np.sqrt(mean + config.norm_epsilon) * weights[f"{name}.scale"]

    def linear(x, name):
        return x @ weights[f"{name}.kernel"] + weights.get(f"{name}.bias", 0.0)

    # Each pair of channels is a complex number, which a position turns.
    turns = config.rope_base ** (-2 * np.arange(width // 2) / width)
    turns = turns / np.asarray(config.rope_divisors or 1.0)
    phases = np.exp(1j * np.arange(length)[:, None] * turns)

    def rotated(x):
        turned = (x[:, : width // 2] + 1j * x[:, width // 2 :]) * phases
        return np.concatenate([turned.real, turned.imag], axis=1)

    x = weights["embedding.embedding"][tokens]
    for layer in range(config.num_layers):
        name = f"blocks.{layer}"
        h = norm(x, f"{name}.attention_norm")
        queries, keys, values = (
            linear(h, f"{name}.attention.{each}").reshape(length, -1, width)
            for each in ("query", "key", "value")
        )
        if config.qk_norm:
            queries = norm(queries, f"{name}.attention.query_norm")
            keys = norm(keys, f"{name}.attention.key_norm")
        outputs = np.empty_like(queries)
        for head in range(config.num_query_heads):
            read = head // (config.num_query_heads // config.num_kv_heads)
            scores = rotated(queries[:, head]) @ rotated(keys[:, read]).T / math.sqrt(width)
            scores[np.triu_indices(length, 1)] = -np.inf
            masses = np.exp(scores - scores.max(axis=1, keepdims=True))
            outputs[:, head] = masses / masses.sum(axis=1, keepdims=True) @ values[:, read]
        x = x + linear(outputs.reshape(length, -1), f"{name}.attention.out")
        h = norm(x, f"{name}.mlp_norm")
        gate = linear(h, f"{name}.mlp.gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, f"{name}.mlp.up"), f"{name}.mlp.down")
    x = norm(x, "final_norm")
    if config.tied_embeddings:
        return x @ weights["embedding.embedding"].T
    return x @ weights["head.kernel"]


SPECIAL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
MERGES = ("1 2", "12 3", "h e", "l l", "he ll", "Ġ Ġ")


def vocabulary() -> list[str]:
    """Tokens of a byte-level BPE: all bytes, what `MERGES` make of them, and `SPECIAL`."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return [*SPECIAL, *alphabet, *(merge.replace(" ", "") for merge in MERGES)]


def write_tokenizer(folder: pathlib.Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, digits one by one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    places = {token: place for place, token in enumerate(vocabulary())}
    made = Tokenizer(models.BPE(places, [tuple(merge.split()) for merge in MERGES]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    made.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def tokenizer_fields(pre: str = "smollm", **changed: object) -> dict[str, object]:
    """The same tokenizer as a GGUF file describes it."""
    tokens = vocabulary()
    found = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "merges": list(MERGES),
        "eos_token_id": tokens.index("<|im_end|>"),
        "bos_token_id": tokens.index("<|endoftext|>"),
        "add_bos_token": False,
        **changed,
    }
    return {f"tokenizer.ggml.{name}": entry for name, entry in found.items()}
