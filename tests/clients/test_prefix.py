"""Models of google-tunix that go on from compressed documents."""

import chex
import jax
import jax.numpy as jnp
import pytest
from tunix.generate import sampler

import coreset_jax as cj
from coreset_jax.nn.tunix import init_cache, open_prefix, wrap_model
from coreset_jax.prefixes import Prefix
from tests.clients import tiny
from tests.clients.test_tunix import Letters

SLOTS, READ = 80, 30
BEHIND = {"size": 128, "sinks": 0, "window": 64, "block_size": 64}


def whole_prefix(model, cache, length):
    """A prefix that holds all that the plain caches of a model hold of its first sequence."""
    pairs = [
        jnp.stack([cache[f"layer_{i}"][name][0, :length] for i in range(len(model.layers))])
        for name in ("k", "v")
    ]
    keys, values = (each.swapaxes(1, 2) for each in pairs)
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), keys.shape[:3])
    coreset = cj.Coreset(keys, values, jnp.zeros(places.shape), places)
    return Prefix.of(coreset, length=length, model="tiny", page_size=4)


@pytest.mark.parametrize("architecture", ["qwen3", "llama3"])
def test_behind_a_document_that_is_held_whole(architecture):
    """The logits are those of the plain model, which reads document and question at once."""
    tokens = tiny.random_tokens(1, 40)
    model = tiny.build(architecture)
    cache = tiny.plain_cache(model, 1, SLOTS)
    plain, cache = tiny.run(model, cache, tokens, 40, SLOTS)
    prefix = whole_prefix(model, cache, READ)
    wrap_model(model, **BEHIND)
    # Two sequences share the document, and stand at positions of their own behind it.
    cache = init_cache(model, 2, prefix=prefix)
    question = jnp.repeat(tokens[:, READ:], 2, axis=0)
    found, _ = tiny.run(model, cache, question, 6, 10)
    for row in found:
        chex.assert_trees_all_close(row, plain[0, READ:], rtol=0, atol=2e-6)


def test_samplers_answer_about_the_document():
    texts = []
    for document in (None, "attention is a sum of "):
        model = tiny.build("qwen3")
        config = sampler.CacheConfig(SLOTS, len(model.layers), tiny.KV_HEADS, tiny.HEAD_DIM)
        options = {"max_generation_steps": 12, "eos_tokens": [tiny.VOCABULARY]}
        if document is None:
            # The whole text as one prompt.
            ask = sampler.Sampler(model, Letters(), config)
            texts += ask(["attention is a sum of weights"], max_prompt_length=32, **options).text
            continue
        ids = jnp.asarray([[1, *Letters().encode(document)]], jnp.int32)
        cache = tiny.plain_cache(model, 1, SLOTS)
        _, cache = tiny.run(model, cache, ids, ids.shape[1], SLOTS)
        prefix = whole_prefix(model, cache, ids.shape[1])
        wrap_model(model, **BEHIND)
        open_prefix(model, prefix)
        # The sampler puts the beginning token before every prompt: take it for the last letter.
        ask = sampler.Sampler(model, WithoutBeginning(), config)
        texts += ask(["weights"], max_prompt_length=8, **options).text
    assert texts[0] == texts[1]


class WithoutBeginning(Letters):
    """A tokenizer for what follows a document."""

    def bos_id(self):
        return None


def test_what_cannot_be_opened_is_refused():
    model = tiny.build("qwen3")
    cache = tiny.plain_cache(model, 1, SLOTS)
    prefix = whole_prefix(model, cache, 8)
    wrap_model(model, layers=[1], **BEHIND)
    with pytest.raises(ValueError, match="all of whose layers"):
        init_cache(model, 1, prefix=prefix)
    model = tiny.build("qwen2")
    wrap_model(model, **BEHIND)
    with pytest.raises(ValueError, match="sines and cosines"):
        tiny.run(model, init_cache(model, 1, prefix=prefix), tiny.random_tokens(1, 4), 4, 8)
    with pytest.raises(ValueError, match="prefix must have 2 layers"):
        open_prefix(model, Prefix(prefix.layers[:1], 8, "tiny"))
    assert not jax.tree.leaves(model.init_cache(1)["layer_0"]["coreset"].prefix)
