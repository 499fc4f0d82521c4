"""Tiny random models of google-tunix, their own caches, and loops over both."""

import jax
import jax.numpy as jnp
from flax import nnx
from tunix.models.gemma import model as gemma2
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma4 import model as gemma4
from tunix.models.llama3 import model as llama3
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen3 import model as qwen3

ARCHITECTURES = ("qwen2", "qwen3", "llama3", "gemma2", "gemma3", "gemma4")
GLOBAL_LAYER = {"gemma2": 1, "gemma3": 5, "gemma4": 1, "llama3": 1, "qwen2": 1, "qwen3": 1}
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
    if architecture == "qwen2":
        options = {"num_layers": 2, "rope_theta": 10_000, "norm_eps": 1e-6, **_SIZES, **options}
        model = qwen2.Qwen2(qwen2.ModelConfig(vocab_size=VOCABULARY, **options), rngs=rngs)
    elif architecture == "qwen3":
        options = {"num_layers": 2, "rope_theta": 10_000, "norm_eps": 1e-6, **_SIZES, **options}
        model = qwen3.Qwen3(qwen3.ModelConfig(vocab_size=VOCABULARY, **options), rngs=rngs)
    elif architecture == "llama3":
        options = {"num_layers": 2, "rope_theta": 10_000, "norm_eps": 1e-5, **_SIZES, **options}
        model = llama3.Llama3(llama3.ModelConfig(vocab_size=VOCABULARY, **options), rngs=rngs)
    elif architecture == "gemma2":
        kinds = (gemma2.AttentionType.LOCAL_SLIDING, gemma2.AttentionType.GLOBAL)
        options = {"num_layers": 2, "attention_types": kinds, "sliding_window_size": 8, **options}
        # A cap that scores of these layers reach.
        options = {"attn_logits_soft_cap": 2.0, "final_logit_softcap": 30.0, **_SIZES, **options}
        options = {"use_post_attn_norm": True, "use_post_ffw_norm": True, **options}
        model = gemma2.Gemma(gemma2.ModelConfig(num_embed=VOCABULARY, **options), rngs=rngs)
    elif architecture == "gemma4":
        kinds = (gemma4.AttentionType.LOCAL_SLIDING, gemma4.AttentionType.GLOBAL)
        options = {"num_layers": 4, "attention_pattern": kinds, "sliding_window_size": 8, **options}
        # The last two layers read the caches of the first two.
        options = {"frac_shared_layers": 0.5, "global_key_size": HEAD_DIM, **_SIZES, **options}
        model = gemma4.Gemma4(gemma4.ModelConfig(num_embed=VOCABULARY, **options), rngs=rngs)
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


def call(attention, inputs, positions, cache, mask):
    """The cache and the outputs of an attention, whatever it is told of positions."""
    if isinstance(attention, qwen2.Attention):
        sin, cos = qwen2._generate_pos_embeddings(positions, HEAD_DIM, 10_000)
        return attention(inputs, cache, mask, sin, cos)
    # Gemma 4 returns keys and values as well.
    return attention(inputs, positions, cache, mask)[:2]


def global_attention(architecture, **options):
    """The attention of the first layer that sees the whole sequence."""
    return build(architecture, **options).layers[GLOBAL_LAYER[architecture]].attn


def inputs_like(attention, count, batch=2):
    """Inputs of an attention."""
    output = getattr(attention, "attn_vec_einsum", None) or attention.o_proj
    return jax.random.normal(jax.random.key(3), (batch, count, output.shape[-1]))


def layer_cache(batch: int, slots: int) -> dict:
    """The cache of a layer as the models have it."""
    shape = (batch, slots, KV_HEADS, HEAD_DIM)
    return {
        "k": jnp.zeros(shape),
        "v": jnp.zeros(shape),
        "end_index": jnp.zeros(batch, jnp.int32),
    }


def plain_cache(model, batch: int, slots: int) -> dict:
    if isinstance(model, gemma4.Gemma4):
        # Layers that share a cache have none, and windows are rings.
        return jax.tree.map(jnp.asarray, model.init_cache(batch, slots, jnp.float32))
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
