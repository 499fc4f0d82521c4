"""The language model of the experiments: its text, arithmetic, checkpoint and training."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import train_lm as train_config
from experiments.model import attention, decoder, lm, text, train_lm, training

MEGABYTE = 1_000_000
SMALL = lm.ModelConfig(
    num_layers=2,
    embed_dim=32,
    num_query_heads=4,
    num_kv_heads=2,
    head_dim=16,
    mlp_dim=48,
    bigram_buckets=64,
    trigram_buckets=128,
    ngram_dim=8,
)


@pytest.fixture(scope="module")
def shipped() -> lm.Decoder:
    return lm.load()[0]


@pytest.fixture(scope="module")
def small() -> lm.Decoder:
    """A small model without zeros, which fresh output projections are full of."""
    model = lm.Decoder(SMALL, rngs=nnx.Rngs(params=1))
    graph, parameters = nnx.split(model)
    leaves, structure = jax.tree.flatten(parameters)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noisy = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(structure, noisy))


class TestText:
    def test_split_is_disjoint_and_covers_a_few_percent(self) -> None:
        train, heldout = text.stdlib_files("train"), text.stdlib_files("heldout")
        assert not set(train) & set(heldout)
        assert 0.02 < len(heldout) / (len(train) + len(heldout)) < 0.08

    def test_split_depends_on_the_path_alone(self) -> None:
        # Pinned: the shipped checkpoint was trained under exactly this rule.
        assert text.split_of("pdb.py") == "heldout"
        assert text.split_of("asyncio/selector_events.py") == "heldout"
        assert text.split_of("wsgiref/validate.py") == "heldout"
        assert text.split_of("argparse.py") == "train"
        assert text.split_of("json/decoder.py") == "train"

    def test_generated_files_are_in_neither_split(self) -> None:
        root = text.stdlib_root()
        names = {
            path.relative_to(root).as_posix()
            for split in ("train", "heldout")
            for path in text.stdlib_files(split)
        }
        assert not [name for name in names if name.startswith(("encodings/", "pydoc_data/"))]
        assert not [name for name in names if "site-packages" in name or "_sysconfigdata" in name]

    def test_standard_library_without_tests(
        self, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "asyncio").mkdir()
        for name in ("pdb.py", "argparse.py", "asyncio/locks.py"):
            (tmp_path / name).write_text("import os\n")
        (tmp_path / "empty.py").touch()
        monkeypatch.setattr(text, "stdlib_root", lambda: tmp_path)
        text.stdlib_files.cache_clear()
        try:
            assert text.stdlib_files("heldout") == (tmp_path / "pdb.py",)
            assert text.stdlib_files("train") == (
                tmp_path / "argparse.py",
                tmp_path / "asyncio/locks.py",
            )
        finally:
            text.stdlib_files.cache_clear()

    def test_demo_text_is_held_out_and_long(self) -> None:
        assert text.stdlib_root() / text.DEMO_PATH in text.stdlib_files("heldout")
        assert text.demo_text().size >= 8192
        assert text.demo_text(100).shape == (100,)
        with pytest.raises(ValueError, match="length"):
            text.demo_text(0)

    def test_stream_marks_every_file(self) -> None:
        stream = text.stream("heldout")
        assert stream[0] == text.BOUNDARY
        assert int(np.sum(stream == text.BOUNDARY)) == len(text.stdlib_files("heldout"))

    def test_empty_file_is_refused(self, tmp_path: pathlib.Path) -> None:
        (tmp_path / "empty.py").touch()
        with pytest.raises(ValueError, match="empty"):
            text.read_tokens(tmp_path / "empty.py")

    def test_unknown_split_is_refused(self) -> None:
        with pytest.raises(ValueError, match="split"):
            text.stdlib_files("validation")  # type: ignore[arg-type]


class TestModel:
    @pytest.mark.parametrize("length", [1, 127, 300])
    def test_causal_attention_is_that_of_jax(self, length: int) -> None:
        keys = jax.random.split(jax.random.key(0), 3)
        queries = 3 * jax.random.normal(keys[0], (2, length, 4, 16))
        key, value = (jax.random.normal(each, (2, length, 2, 16)) for each in keys[1:])
        expected = jax.nn.dot_product_attention(queries, key, value, is_causal=True)
        np.testing.assert_allclose(
            jax.jit(attention.causal_attention)(queries, key, value),
            expected,
            rtol=2e-5,
            atol=2e-5,
        )

    def test_rope_scores_depend_on_distance_alone(self) -> None:
        query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 64))

        def score(query_position: int, key_position: int) -> float:
            rotated = [
                decoder.rope(x, jnp.array([[position]]), 100_000.0)
                for x, position in ((query, query_position), (key, key_position))
            ]
            return float(jnp.sum(rotated[0] * rotated[1]))

        assert score(700, 600) == pytest.approx(score(100, 0), abs=1e-3)
        assert score(700, 600) != pytest.approx(score(700, 500), abs=1e-3)

    @pytest.mark.slow
    def test_first_layer_against_float64(self, small: lm.Decoder) -> None:
        tokens = np.random.default_rng(0).integers(0, 256, 150)
        trace = lm.caches(small, tokens)
        queries, keys, values, out = _first_layer(small, tokens)
        np.testing.assert_allclose(trace.queries[0], queries, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(trace.keys[0], keys, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(trace.values[0], values, rtol=1e-4, atol=1e-4)
        x, positions = small.embed(jnp.asarray(tokens)[None])
        block = small.blocks[0]
        actual = block.attention(block.attention_norm(x), positions)[0]
        np.testing.assert_allclose(actual, out, rtol=1e-4, atol=1e-4)

    def test_queries_and_keys_have_the_norm_that_bounds_the_scores(self, small: lm.Decoder) -> None:
        trace = lm.caches(small, np.random.default_rng(6).integers(0, 256, 60))
        for each in (trace.queries, trace.keys):
            np.testing.assert_allclose(np.linalg.norm(each, axis=-1), 4.0, rtol=1e-4)
        assert np.linalg.norm(trace.values, axis=-1).std() > 0.1

    def test_trace_shapes_with_and_without_batch(self, small: lm.Decoder) -> None:
        tokens = np.random.default_rng(1).integers(0, 256, (3, 40)).astype(np.uint8)
        batched, single = lm.caches(small, tokens), lm.caches(small, tokens[1])
        assert batched.queries.shape == (3, 2, 4, 40, 16)
        assert batched.keys.shape == batched.values.shape == (3, 2, 2, 40, 16)
        assert single.keys.shape == (2, 2, 40, 16)
        assert single.keys.dtype == jnp.float32
        for whole, part in zip(batched, single, strict=True):
            np.testing.assert_allclose(whole[1], part, rtol=1e-4, atol=1e-4)

    @pytest.mark.slow
    def test_causality(self, small: lm.Decoder) -> None:
        tokens = np.random.default_rng(2).integers(0, 256, (1, 200))
        changed = tokens.copy()
        changed[0, 150] ^= 1
        before, after = small(tokens), small(changed)
        np.testing.assert_array_equal(before[:, :150], after[:, :150])
        assert np.abs(before[:, 150:] - after[:, 150:]).max() > 1e-2

    @pytest.mark.slow
    def test_embedding_in_pieces(self, small: lm.Decoder) -> None:
        tokens = jnp.asarray(np.random.default_rng(3).integers(0, 256, (2, 20)))
        whole, _ = small.embed(tokens)
        tail, _ = small.embed(tokens[:, 12:], previous=tokens[:, 10:12])
        np.testing.assert_array_equal(whole[:, 12:], tail)

    @pytest.mark.slow
    def test_byte_costs_are_those_of_the_logits(self, small: lm.Decoder) -> None:
        tokens = np.random.default_rng(4).integers(0, 256, (2, 30))
        probabilities = np.asarray(jax.nn.softmax(small(tokens)), np.float64)
        expected = -np.log2(
            np.take_along_axis(probabilities[:, :-1], tokens[:, 1:, None], 2)[..., 0]
        )
        np.testing.assert_allclose(lm.byte_costs(small, tokens), expected, rtol=1e-4, atol=1e-4)
        assert lm.bits_per_byte(small, tokens) == pytest.approx(expected.mean(), rel=1e-4)

    @pytest.mark.slow
    def test_stream_is_read_in_cold_windows(self, small: lm.Decoder) -> None:
        stream = np.random.default_rng(5).integers(0, 256, 48).astype(np.uint8)
        # 47 bytes to predict: twice 20 and 7, every window from the last byte of the one before.
        parts = [np.asarray(lm.byte_costs(small, stream[at : at + 21])) for at in (0, 20, 40)]
        assert [part.size for part in parts] == [20, 20, 7]
        actual = lm.stream_bits_per_byte(small, stream, width=20)
        assert actual == pytest.approx(np.concatenate(parts).mean(), rel=1e-5)
        with pytest.raises(ValueError, match="stream"):
            lm.stream_bits_per_byte(small, stream[:1], width=20)

    @pytest.mark.slow
    def test_save_and_load(self, small: lm.Decoder, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "model.safetensors"
        lm.save(path, small, SMALL, {"step": "3"})
        loaded, config = lm.load(path)
        assert config == SMALL
        assert lm.metadata(path)["step"] == "3"
        for actual, expected in zip(
            jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(small)), strict=True
        ):
            assert actual.dtype == jnp.float32
            np.testing.assert_array_equal(actual, expected.astype(jnp.bfloat16).astype(jnp.float32))

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (np.zeros((0,), np.uint8), r"\(0,\)"),
            (np.zeros((1, 2, 3), np.uint8), r"\(1, 2, 3\)"),
            (np.zeros((4,), np.float32), "float32"),
        ],
    )
    def test_bad_tokens_are_refused(
        self, small: lm.Decoder, tokens: np.ndarray, message: str
    ) -> None:
        for call in (lm.caches, lm.byte_costs, lm.bits_per_byte):
            with pytest.raises(ValueError, match=f"tokens .*{message}"):
                call(small, tokens)

    def test_missing_checkpoint_is_named(self, tmp_path: pathlib.Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
            lm.load(tmp_path / "absent.safetensors")

    @pytest.mark.parametrize(
        ("field", "value"), [("num_query_heads", 3), ("head_dim", 7), ("bigram_buckets", 100)]
    )
    def test_bad_config_is_refused(self, field: str, value: int) -> None:
        with pytest.raises(ValueError, match=field):
            lm.ModelConfig(**{field: value})


def _first_layer(
    model: lm.Decoder, tokens: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Recompute queries, keys, values and attention output of layer 0, plainly and in float64."""

    def exact(variable: nnx.Param) -> np.ndarray:
        return np.asarray(variable.get_value(), np.float64)

    embedding, block = model.embedding, model.blocks[0]
    history = [text.BOUNDARY, text.BOUNDARY, *map(int, tokens)]
    rows = []
    for third, second, last in zip(history, history[1:], history[2:], strict=False):
        pair, triple = 256 * second + last, 65536 * third + 256 * second + last
        bigram = (pair * 0x9E3779B1 % 2**32) * embedding.bigram_buckets >> 32
        trigram = (triple * 0x9E3779B1 % 2**32) * embedding.trigram_buckets >> 32
        ngrams = np.concatenate(
            [exact(embedding.bigram.embedding)[bigram], exact(embedding.trigram.embedding)[trigram]]
        )
        rows.append(
            exact(embedding.byte.embedding)[last] + ngrams @ exact(embedding.ngram_out.kernel)
        )
    x = np.stack(rows)
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + 1e-6) * exact(block.attention_norm.scale)

    attention = block.attention
    length, head_dim = len(tokens), attention.head_dim
    frequencies = attention.rope_base ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = np.exp(1j * np.arange(length)[:, None] * frequencies)

    def heads(linear: nnx.Linear, rotate: bool) -> np.ndarray:
        y = (x @ exact(linear.kernel)).reshape(length, -1, head_dim).transpose(1, 0, 2)
        if rotate:
            y = y / np.sqrt(np.mean(y**2, axis=2, keepdims=True) + 1e-6)
            turned = (y[..., : head_dim // 2] + 1j * y[..., head_dim // 2 :]) * turns
            y = np.concatenate([turned.real, turned.imag], axis=-1)
        return y

    queries, keys = heads(attention.query, True), heads(attention.key, True)
    values = heads(attention.value, False)
    group = len(queries) // len(keys)
    outputs = []
    for head, query in enumerate(queries):
        scores = query @ keys[head // group].T / np.sqrt(head_dim)
        weights = np.exp(scores) * np.tri(length)
        outputs.append(weights @ values[head // group] / weights.sum(axis=1, keepdims=True))
    out = np.concatenate(outputs, axis=1) @ exact(attention.out.kernel)
    return queries, keys, values, out


class TestShippedCheckpoint:
    def test_size_and_config(self, shipped: lm.Decoder) -> None:
        assert lm.CHECKPOINT.stat().st_size <= 8 * MEGABYTE
        assert lm.parameter_count(shipped) <= 4_000_000
        config = lm.load()[1]
        assert config == lm.ModelConfig(**train_config.get_config().model)
        assert (config.num_layers, config.num_kv_heads, config.head_dim) == (4, 2, 64)

    def test_metadata_tells_how_it_was_made(self) -> None:
        metadata = lm.metadata()
        stages = [train_config.get_config(name) for name in train_config.STAGES]
        assert metadata["seed"] == str(stages[-1].seed)
        assert metadata["step"] == str(sum(steps for steps, _, _ in stages[-1].phases))
        read = sum(math.prod(phase) for config in stages for phase in config.phases)
        assert metadata["bytes_read"] == str(read)
        assert float(metadata["heldout_bits_per_byte"]) < 1.7

    @pytest.mark.slow
    def test_heldout_text(self, shipped: lm.Decoder) -> None:
        sample = text.windows(text.stream("heldout"), 8, 2048)
        assert lm.bits_per_byte(shipped, sample) < 1.7

    @pytest.mark.slow
    def test_repeated_text_is_cheaper(self, shipped: lm.Decoder) -> None:
        passages = text.demo_text(4096).reshape(16, 256)

        def cost_after(before: np.ndarray) -> float:
            costs = lm.byte_costs(shipped, np.concatenate([before, passages], axis=1))
            return float(np.mean(costs[:, 255:]))

        # After another passage of the same file, and after itself.
        assert cost_after(passages) < 0.9 * cost_after(np.roll(passages, 1, axis=0))

    @pytest.mark.slow
    def test_sane_at_twice_the_trained_context(self, shipped: lm.Decoder) -> None:
        costs = np.asarray(lm.byte_costs(shipped, text.demo_text(8192)))
        assert np.isfinite(costs).all()
        assert costs[4096:].mean() < 2.0


class TestTraining:
    def test_batches_visit_every_window_once_an_epoch(self) -> None:
        stream = (np.arange(1000) % 251).astype(np.uint8)
        phases = [training.Phase(2, 3, 100), training.Phase(4, 2, 100)]
        # 8 windows of 100 and room to move them: four batches of 2 are an epoch.
        rows = np.concatenate([training.batch_at(stream, phases, 0, step) for step in range(2, 6)])
        assert rows.shape == (8, 101)
        starts = sorted(int(row[0]) for row in rows)
        assert len(set(starts)) == 8
        again = training.batch_at(stream, phases, 0, 3)
        np.testing.assert_array_equal(again, rows[2:4])
        assert not np.array_equal(again, training.batch_at(stream, phases, 1, 3))
        with pytest.raises(ValueError, match="step"):
            training.batch_at(stream, phases, 0, 6)

    def test_learning_rate_warms_up_holds_and_decays(self) -> None:
        config = train_config.get_config("tiny")
        factor = training.learning_rate_factor(config)
        assert [float(factor(step)) for step in (0, 1, 2, 8, 12, 16)] == [0, 0.5, 1, 1, 0.5, 0]
        config.decay_start = 100
        with pytest.raises(ValueError, match="decay_start"):
            training.learning_rate_factor(config)

    @pytest.mark.slow
    def test_bfloat16_products_and_their_gradients(self) -> None:
        x = jax.random.normal(jax.random.key(0), (2, 40, 32))
        kernel = jax.random.normal(jax.random.key(1), (32, 24))
        numbers = (((2,), (0,)), ((), ()))

        def loss(dot_general, x, kernel):  # type: ignore[no-untyped-def]
            return jnp.sum(jnp.sin(dot_general(x, kernel, numbers)))

        actual = jax.grad(loss, (1, 2))(training.bfloat16_dot_general, x, kernel)
        expected = jax.grad(loss, (1, 2))(jax.lax.dot_general, x, kernel)
        for each, reference in zip(actual, expected, strict=True):
            assert each.dtype == jnp.float32
            error = jnp.linalg.norm(each - reference) / jnp.linalg.norm(reference)
            assert 1e-6 < float(error) < 0.05

    @pytest.mark.slow
    def test_interrupted_run_resumes_exactly(self, tmp_path: pathlib.Path) -> None:
        config = train_config.get_config("tiny")
        root = pathlib.Path(lm.__file__).parents[2]
        command = [
            *(sys.executable, "-m", "experiments.model.train_lm"),
            f"--config={root / 'configs' / 'train_lm.py'}:tiny",
            f"--output={tmp_path / 'whole'}",
        ]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
        train_lm.train(config, tmp_path / "parts", until=7)
        train_lm.train(config, tmp_path / "parts")
        whole, parts = (
            (tmp_path / name / "state.safetensors").read_bytes() for name in ("whole", "parts")
        )
        assert whole == parts

        log = (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
        losses = [record["bits_per_byte"] for record in map(json.loads, log)]
        assert losses[-1] < losses[0] - 1
        assert lm.metadata(tmp_path / "whole" / "model.safetensors")["step"] == "16"

    def test_checkpoint_of_another_config_is_refused(self, tmp_path: pathlib.Path) -> None:
        def state(width: int) -> training.TrainState:
            return training.TrainState(
                jnp.zeros((), jnp.int32), nnx.State({"x": jnp.ones(width)}), ()
            )

        training.write_checkpoint(tmp_path / "state.safetensors", state(3))
        with pytest.raises(ValueError, match="another config"):
            training.read_checkpoint(tmp_path / "state.safetensors", state(4))
