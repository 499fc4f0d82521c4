"""The main job: a model's cache compressed, measured on its own queries, kept and read again."""

import contextlib
import dataclasses
import io
import json
import pathlib
import subprocess
import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

import coreset_jax as cj
from configs import compress_cache as compress_cache_config
from experiments.caches import compress_cache
from experiments.caches.compress_figure import Table
from experiments.caches.passages import Passage, read_passage
from experiments.common.methods import METHODS
from experiments.model import cache_file, lm, text

ROOT = pathlib.Path(__file__).resolve().parents[3]
SOURCE = cache_file.Source(
    text_name="text", text_sha256="0", length=32, model_sha256="1", method="any", ratio=4, seed=0
)


class Job(NamedTuple):
    config: ml_collections.ConfigDict
    passage: Passage
    table: Table
    printed: str
    output: pathlib.Path


def tiny(output: pathlib.Path, **changes: Any) -> ml_collections.ConfigDict:
    config = compress_cache_config.get_config("tiny")
    config.output = str(output)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The tiny variant, once for all tests."""
    output = tmp_path_factory.mktemp("compress_cache")
    config = tiny(output)
    passage = read_passage(config)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        table = compress_cache.run(config)
    return Job(config, passage, table, printed.getvalue(), output)


@pytest.fixture
def cache() -> cache_file.CompressedCache:
    """Two layers of three heads, 8 of 32 pairs each."""
    keys, values = jax.random.normal(jax.random.key(0), (2, 2, 3, 32, 4))
    coreset = cj.baselines.uniform()(jax.random.key(1), keys, values, size=8)
    return cache_file.CompressedCache(coreset, SOURCE)


@pytest.mark.slow
class TestJob:
    def test_table_has_the_geometric_means(self, job: Job) -> None:
        for name in compress_cache.NAMES:
            label = METHODS[name].label
            (row,) = [line for line in job.printed.splitlines() if line.strip().startswith(label)]
            figures = [float(word) for word in row.split(label)[1].split()]
            expected = []
            for ratio in (2, 8):
                error, reference = (
                    np.exp(np.mean(np.log(job.table[each, ratio].means)))
                    for each in (name, "uniform")
                )
                expected += [error, error / reference]
            np.testing.assert_allclose(figures, expected, atol=0.006)

    def test_errors_are_those_of_plain_attention_in_float64(self, job: Job) -> None:
        """One head of the kept coreset by numpy, from the trace of the model on."""
        layer, head, length = 2, 1, job.passage.length
        model, config = lm.load()
        trace = jax.tree.map(
            lambda array: np.asarray(array, np.float64), lm.caches(model, job.passage.tokens)
        )
        keys, values = trace.keys[layer, head, :length], trace.values[layer, head, :length]
        group = config.num_query_heads // config.num_kv_heads
        queries = trace.queries[layer, group * head : group * (head + 1), length:]
        coreset = cache_file.load(job.output / "cache-8x.safetensors").coreset
        kept_keys, kept_values, log_weights = (
            np.asarray(leaf[layer, head], np.float64) for leaf in coreset[:3]
        )
        # Keys that have moved meet the queries by themselves.
        flat = queries.reshape(-1, config.head_dim) / np.sqrt(config.head_dim)
        scores = flat @ keys.T

        def answer(scores: np.ndarray, values: np.ndarray) -> np.ndarray:
            masses = np.exp(scores - scores.max(axis=-1, keepdims=True))
            return masses @ values / masses.sum(axis=-1, keepdims=True)

        exact = answer(scores, values)
        wrong = answer(flat @ kept_keys.T + log_weights, kept_values) - exact
        norms = [np.linalg.norm(each, axis=-1).mean() for each in (wrong, exact)]
        measured = job.table[compress_cache.OURS, 8].errors[0, layer, head]
        np.testing.assert_allclose(measured, norms[0] / norms[1], rtol=1e-3)

    def test_lines_hold_every_method_ratio_and_head(self, job: Job) -> None:
        records = [json.loads(line) for line in (job.output / "errors.jsonl").open()]
        layers, heads = job.table["uniform", 2].means.shape
        assert len(records) == len(compress_cache.NAMES) * 2 * layers * heads
        for record in records:
            settings, measurements = record["settings"], record["measurements"]
            measured = job.table[settings["method"], settings["ratio"]]
            place = settings["layer"], settings["head"]
            assert settings["size"] == measured.size == 512 // settings["ratio"]
            assert settings["text_sha256"] == job.passage.sha256
            assert measurements["relative_error"] == pytest.approx(measured.means[place])
            assert measurements["relative_error_by_seed"] == pytest.approx(
                measured.errors[(slice(None), *place)].tolist()
            )

    def test_figure_is_a_png_and_nothing_is_left_aside(self, job: Job) -> None:
        assert (job.output / "errors.png").read_bytes().startswith(b"\x89PNG")
        names = {path.name for path in job.output.iterdir()}
        assert names == {"errors.jsonl", "errors.png", "cache-8x.safetensors"}

    def test_kept_cache_is_that_of_our_method(self, job: Job) -> None:
        coreset, source = cache_file.load(job.output / "cache-8x.safetensors")
        trace = lm.caches(lm.load()[0], job.passage.tokens)
        length = job.passage.length
        keys, values = trace.keys[..., :length, :], trace.values[..., :length, :]
        again = cj.compress(jax.random.key(0), keys, values, size=length // 8)
        np.testing.assert_array_equal(coreset.indices, again.indices)
        np.testing.assert_allclose(coreset.keys, again.keys, atol=1e-3)
        # As fitted, and not scaled to it.
        np.testing.assert_allclose(jnp.exp(coreset.log_weights).sum(axis=-1), 512, rtol=0.1)
        assert source == cache_file.Source(
            text_name=text.DEMO_PATH,
            text_sha256=cache_file.sha256(text.demo_text(512).tobytes()),
            length=512,
            model_sha256=cache_file.sha256(lm.CHECKPOINT),
            method=compress_cache.OURS,
            ratio=8,
            seed=0,
        )

    def test_file_of_the_user_at_a_ratio_beside_the_tables(
        self, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "noise.bin"
        path.write_bytes(np.random.default_rng(0).bytes(600))
        config = tiny(tmp_path / "out", text=str(path), ratios=(2,), ratio=8)
        table = compress_cache.run(config)
        assert {ratio for _, ratio in table} == {2, 8}
        printed = capsys.readouterr().out
        assert "noise.bin" in printed
        coreset, source = cache_file.load(tmp_path / "out" / "cache-8x.safetensors")
        assert coreset.keys.shape[-2] == 64
        assert source.text_name == "noise.bin"
        kept = cache_file.num_bytes(*coreset)
        assert f"{kept:,} bytes" in printed
        assert kept == coreset.log_weights.size * (64 + 64 + 2) * 4


class TestPassage:
    def test_prefix_is_what_the_file_has_up_to_the_cap(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "text"
        path.write_bytes(bytes(range(200)) * 10)
        for cap, length in ((1000, 1000), (16384, 2000 - 64)):
            config = tiny(tmp_path, text=str(path), prefix_bytes=None, max_prefix_bytes=cap)
            passage = read_passage(config)
            assert passage.length == length
            np.testing.assert_array_equal(passage.tokens, text.read_tokens(path)[: length + 64])

    def test_short_file_is_told_how_long_it_must_be(self, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "short"
        path.write_bytes(b"x" * 575)
        with pytest.raises(ValueError, match="short has 575 bytes and 576 are needed"):
            read_passage(tiny(tmp_path, text=str(path)))
        path.write_bytes(b"x" * (16 * 8 + 63))
        with pytest.raises(ValueError, match="short has 191 bytes and 192 are needed"):
            read_passage(tiny(tmp_path, text=str(path), prefix_bytes=None))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"ratio": 1}, "at least 2"),
            ({"ratios": (0, 2)}, "at least 2"),
            ({"prefix_bytes": 7}, "prefix_bytes must be at least the ratio 8, got 7"),
            ({"query_bytes": 0}, "query_bytes must be at least 1"),
            ({"seeds": ()}, "seeds not empty"),
        ],
    )
    def test_bad_settings(
        self, tmp_path: pathlib.Path, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_passage(tiny(tmp_path, **changes))

    @pytest.mark.slow
    def test_missing_file_ends_the_program_in_one_line(self, tmp_path: pathlib.Path) -> None:
        command = [sys.executable, "-m", "experiments.caches.compress_cache"]
        flags = ["--config=configs/compress_cache.py", f"--config.text={tmp_path / 'missing'}"]
        done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode != 0
        assert "compress_cache: " in done.stderr
        assert "missing" in done.stderr
        assert "Traceback" not in done.stderr

    def test_variants(self) -> None:
        for variant in ("default", "demo", "tiny"):
            config = compress_cache_config.get_config(variant)
            assert config.ratio == 8
            assert read_passage(config).name == text.DEMO_PATH
        with pytest.raises(ValueError, match="variant"):
            compress_cache_config.get_config("huge")


class TestCacheFile:
    def test_round_trip_is_bit_identical(
        self, cache: cache_file.CompressedCache, tmp_path: pathlib.Path
    ) -> None:
        path = tmp_path / "folder" / "cache.safetensors"
        cache_file.save(path, cache)
        again = cache_file.load(path)
        assert again.source == cache.source
        for before, after in zip(
            jax.tree.leaves(cache.coreset), jax.tree.leaves(again.coreset), strict=True
        ):
            assert before.dtype == after.dtype
            np.testing.assert_array_equal(before, after)
        queries = jax.random.normal(jax.random.key(2), (2, 3, 5, 4))
        np.testing.assert_array_equal(
            cj.attend(queries, cache.coreset), cj.attend(queries, again.coreset)
        )

    def test_bfloat16_empty_slots_and_normalizers(
        self, cache: cache_file.CompressedCache, tmp_path: pathlib.Path
    ) -> None:
        keys, values = jax.random.normal(jax.random.key(0), (2, 2, 3, 32, 4), jnp.bfloat16)
        lengths = jnp.asarray([[32, 5, 9], [1, 8, 32]])
        coreset = cj.baselines.uniform()(jax.random.key(1), keys, values, size=8, lengths=lengths)
        coreset = cj.baselines.SignedCoreset(*coreset[:4], jnp.ones_like(coreset.log_weights))
        path = tmp_path / "cache.safetensors"
        cache_file.save(path, cache._replace(coreset=coreset))
        again = cache_file.load(path).coreset
        assert again.keys.dtype == jnp.bfloat16
        jax.tree.map(np.testing.assert_array_equal, coreset, again)

    def test_a_scale(self, cache: cache_file.CompressedCache, tmp_path: pathlib.Path) -> None:
        path = tmp_path / "cache.safetensors"
        scale = jnp.asarray([[0.25, 0.5, 1.0], [1.0, 2.0, 4.0]])
        coreset = cache.coreset._replace(scale=scale)
        cache_file.save(path, cache._replace(coreset=coreset))
        again = cache_file.load(path).coreset
        np.testing.assert_array_equal(again.scale, scale)
        queries = jax.random.normal(jax.random.key(2), (2, 3, 5, 4))
        np.testing.assert_array_equal(cj.attend(queries, coreset), cj.attend(queries, again))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"indices": lambda x: x.at[1, 2, 0].set(x[1, 2, 1])}, "distinct"),
            ({"indices": lambda x: x.at[0, 0, -1].set(32)}, "below 32"),
            ({"log_weights": lambda x: x.at[0, 1, 2].set(-jnp.inf)}, "-inf"),
            ({"log_weights": lambda x: x.at[0, 1, 2].set(jnp.nan)}, "log_weights"),
            ({"values": lambda x: x.at[1, 1, 1, 1].set(jnp.inf)}, "values"),
            ({"keys": lambda x: x[0]}, "axes"),
        ],
    )
    def test_what_no_compressor_returns_is_not_written(
        self,
        cache: cache_file.CompressedCache,
        tmp_path: pathlib.Path,
        changes: dict[str, Any],
        message: str,
    ) -> None:
        fields = {name: change(getattr(cache.coreset, name)) for name, change in changes.items()}
        broken = cache._replace(coreset=cache.coreset._replace(**fields))
        with pytest.raises(ValueError, match=message):
            cache_file.save(tmp_path / "cache.safetensors", broken)
        assert not list(tmp_path.iterdir())

    def test_damaged_files_are_refused(
        self, cache: cache_file.CompressedCache, tmp_path: pathlib.Path
    ) -> None:
        path = tmp_path / "cache.safetensors"
        with pytest.raises(FileNotFoundError, match=r"cache\.safetensors"):
            cache_file.load(path)
        cache_file.save(path, cache)
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            cache_file.load(path)

        path.write_bytes(whole)
        with safetensors.safe_open(path, framework="numpy") as opened:
            header = opened.metadata()
        tensors = safetensors.numpy.load(whole)

        def rewrite(tensors: dict[str, np.ndarray], header: dict[str, str]) -> None:
            safetensors.numpy.save_file(tensors, path, metadata=header)

        rewrite(tensors, header | {"format": "another"})
        with pytest.raises(ValueError, match="format 'another'"):
            cache_file.load(path)
        rewrite(tensors, {name: entry for name, entry in header.items() if name != "seed"})
        with pytest.raises(ValueError, match="seed"):
            cache_file.load(path)
        rewrite({name: x for name, x in tensors.items() if name != "layers.1.keys"}, header)
        with pytest.raises(ValueError, match=r"layers\.1\.keys"):
            cache_file.load(path)
        rewrite(tensors, header | {"length": "4"})
        with pytest.raises(ValueError, match="below 4"):
            cache_file.load(path)

    def test_header_tells_everything(
        self, cache: cache_file.CompressedCache, tmp_path: pathlib.Path
    ) -> None:
        path = tmp_path / "cache.safetensors"
        cache_file.save(path, cache)
        with safetensors.safe_open(path, framework="numpy") as opened:
            header = opened.metadata()
        entries = {name: str(entry) for name, entry in dataclasses.asdict(SOURCE).items()}
        assert entries.items() <= header.items()
        assert header["version"] == cj.__version__
        assert (header["layers"], header["kv_heads"], header["size"]) == ("2", "3", "8")
