"""Tiny random models of google-tunix, their own caches, and loops over both."""

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma3 import model as gemma3
from tunix.models.llama3 import model as llama3
from tunix.models.qwen3 import model as qwen3

ARCHITECTURES = ("qwen3", "llama3", "gemma3")
VOCABULARY = 64
KV_HEADS, HEAD_DIM = 2, 16
_SIZES = {
    "embed_dim": 32,
    "hidden_dim": 48,
    "num_heads": 4,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
}


def build(architecture: str, **options):
    """A random model whose attention is not flat and whose logits are about one."""
    rngs = nnx.Rngs(0)
    if architecture == "qwen3":
        options = {"num_layers": 2, "rope_theta": 10_000, "norm_eps": 1e-6, **_SIZES, **options}
        model = qwen3.Qwen3(qwen3.ModelConfig(vocab_size=VOCABULARY, **options), rngs=rngs)
    elif architecture == "llama3":
        options = {"num_layers": 2, "rope_theta": 10_000, "norm_eps": 1e-5, **_SIZES, **options}
        model = llama3.Llama3(llama3.ModelConfig(vocab_size=VOCABULARY, **options), rngs=rngs)
    else:
        # Every sixth layer is global.
        options = {"num_layers": 6, "sliding_window_size": 8, **_SIZES, **options}
        options = {"param_dtype": jnp.float32, **options}
        model = gemma3.Gemma3(gemma3.ModelConfig(num_embed=VOCABULARY, **options), rngs=rngs)

    def draw(path, variable):
        name = "/".join(map(str, path))
        key = jax.random.fold_in(jax.random.key(1), sum(name.encode()))
        noise = jax.random.normal(key, variable.shape, variable.dtype)
        if variable.ndim == 1:
            return variable + 0.1 * noise
        if "embed" in name or "lm_head" in name:
            return 0.05 * noise
        return noise / _SIZES["embed_dim"] ** 0.5

    params = nnx.state(model, nnx.Param)
    drawn = {path: draw(path, leaf[...]) for path, leaf in nnx.to_flat_state(params)}
    for path, leaf in nnx.to_flat_state(params):
        leaf.set_value(drawn[path])
    nnx.update(model, params)
    return model


def layer_cache(batch: int, slots: int) -> dict:
    """The cache of a layer as the models have it."""
    shape = (batch, slots, KV_HEADS, HEAD_DIM)
    return {
        "k": jnp.zeros(shape),
        "v": jnp.zeros(shape),
        "end_index": jnp.zeros(batch, jnp.int32),
    }


def plain_cache(model, batch: int, slots: int) -> dict:
    return {f"layer_{i}": layer_cache(batch, slots) for i in range(len(model.layers))}


def causal_mask(start: int, count: int, slots: int):
    return (jnp.arange(slots) <= start + jnp.arange(count)[:, None])[None]


@nnx.jit
def step(model, tokens, positions, cache, mask):
    return model(tokens, positions, cache, mask)


def run(model, cache, tokens, prompt: int, slots: int):
    """Logits of a prompt in one call and of the rest one at a time, and the cache at the end."""
    logits, start = [], 0
    for count in (prompt, *[1] * (tokens.shape[1] - prompt)):
        positions = jnp.broadcast_to(start + jnp.arange(count), (tokens.shape[0], count))
        mask = jnp.broadcast_to(causal_mask(start, count, slots), (tokens.shape[0], count, slots))
        some, cache = step(model, tokens[:, start : start + count], positions, cache, mask)
        logits.append(some)
        start += count
    return jnp.concatenate(logits, axis=1), cache


def random_tokens(batch: int, count: int):
    return jax.random.randint(jax.random.key(2), (batch, count), 3, VOCABULARY)


def cache_bytes(cache) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
