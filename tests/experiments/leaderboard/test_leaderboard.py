"""The bake-off: its caches, its texts, its queries, its arithmetic, and a tiny run of it."""

import contextlib
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from configs import leaderboard as leaderboard_config
from coreset_jax._src.core.coreset import whole_cache
from experiments.common.methods import (
    CATEGORIES,
    ENTRANTS,
    FREE,
    METHODS,
    PLAIN,
    QUANTIZED,
    TRAITS,
    Method,
    chosen,
    identity,
)
from experiments.common.metrics import coreset_bytes, divergence, relative_error
from experiments.leaderboard import leaderboard
from experiments.leaderboard import work as works
from experiments.leaderboard.tables import gather
from experiments.leaderboard.texts import KINDS, passages
from experiments.model import decoding, lm

NORMAL = jax.random.normal


@pytest.fixture(scope="module")
def model():
    return lm.load()[0]


def invented_coreset(normalizers):
    """Two sequences, two heads, five slots, one of them empty."""
    keys, values = NORMAL(jax.random.key(0), (2, 2, 2, 5, 4))
    rng = np.random.default_rng(0)
    log_weights = rng.normal(size=(2, 2, 5)).astype(np.float32)
    log_weights[0, 1, 3] = -np.inf
    # Some of them negative, as WildCat has them.
    signed = jnp.asarray(rng.uniform(-0.1, 1.0, (2, 2, 5)), jnp.float32)
    plain = cj.Coreset(keys, values, jnp.asarray(log_weights), jnp.zeros((2, 2, 5), jnp.int32))
    return cj.baselines.SignedCoreset(*plain[:4], signed) if normalizers else plain


def answer(query, coreset, row, head, keys, values):
    """The answer to one query over a coreset and exact pairs, a pair at a time."""
    numerator, denominator = np.zeros(values.shape[-1]), 0.0
    for slot in range(coreset.keys.shape[2]):
        score = np.dot(query, coreset.keys[row, head, slot]) / np.sqrt(len(query))
        mass = np.exp(score + float(coreset.log_weights[row, head, slot]))
        numerator += mass * np.asarray(coreset.values[row, head, slot])
        one = isinstance(coreset, cj.Coreset)
        denominator += mass * (1.0 if one else float(coreset.normalizers[row, head, slot]))
    for key, value in zip(keys, values, strict=True):
        mass = np.exp(np.dot(query, key) / np.sqrt(len(query)))
        numerator += mass * np.asarray(value)
        denominator += mass
    return numerator / denominator


@pytest.mark.parametrize("normalizers", [False, True])
def test_coreset_and_exact_pairs_against_brute_force(normalizers):
    coreset = invented_coreset(normalizers)
    stacked = jax.tree.map(lambda leaf: leaf[None], coreset)
    (cache,) = decoding.behind_coresets(stacked, prompt_length=9, room=6)
    queries = NORMAL(jax.random.key(1), (2, 5, 4, 4))
    keys, values = NORMAL(jax.random.key(2), (2, 2, 5, 2, 4))
    found = []
    for start, stop in ((0, 2), (2, 5)):
        part = slice(start, stop)
        found.append(cache.attend(queries[:, part], keys[:, part], values[:, part]))
        cache = cache.append(keys[:, part], values[:, part])
    assert np.all(np.asarray(cache.lengths) == 14)
    found = np.concatenate(found, axis=1)
    coreset, queries, keys, values = jax.tree.map(np.asarray, (coreset, queries, keys, values))
    for row, place, head in np.ndindex(2, 5, 4):
        seen = (row, slice(place + 1), head // 2)
        expected = answer(
            queries[row, place, head], coreset, row, head // 2, keys[seen], values[seen]
        )
        np.testing.assert_allclose(found[row, place, head], expected, rtol=2e-4, atol=1e-5)


@pytest.mark.slow
def test_without_anything_behind_it_is_attention_over_the_coreset():
    """One new pair that nobody looks at: its key points away from every query."""
    coreset = invented_coreset(normalizers=True)
    (cache,) = decoding.behind_coresets(jax.tree.map(lambda leaf: leaf[None], coreset), 9, 3)
    queries = jnp.abs(NORMAL(jax.random.key(1), (2, 1, 4, 4))) + 1
    away, values = jnp.full((2, 1, 2, 4), -1e3), jnp.ones((2, 1, 2, 4))
    expected = cj.attend(queries.reshape(2, 2, 2, 4), coreset)
    found = cache.attend(queries, away, values).reshape(2, 2, 2, 4)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_whole_cache_costs_what_the_model_costs(model):
    tokens = passages("code", 2, 120, 0)
    texts = works.read_texts(model, tokens, 80, 20)
    coreset = whole_cache(texts.keys.swapaxes(0, 1), texts.values.swapaxes(0, 1))
    caches = decoding.behind_coresets(coreset, 80, 40)
    found = decoding.costs(model, caches, tokens[:, 80:], tokens[:, 78:80], 16)
    np.testing.assert_allclose(found, lm.byte_costs(model, tokens)[:, 80:], atol=2e-4)


def test_divergence_against_brute_force_and_its_theorems():
    rng = np.random.default_rng(0)
    exact, other = np.log(rng.dirichlet(np.ones(256), (2, 2, 5)))
    found = divergence(exact, other)
    for row in range(2):
        bits = [
            sum(np.exp(p) * np.log2(np.exp(p) / np.exp(q)) for p, q in zip(*each, strict=True))
            for each in zip(exact[row], other[row], strict=True)
        ]
        np.testing.assert_allclose(found[row], np.mean(bits), rtol=1e-9)
    assert np.all(found > 0)
    np.testing.assert_array_equal(divergence(exact, exact), np.zeros(2))


@pytest.mark.slow
def test_divergence_is_the_loss_to_expect_where_texts_come_as_the_full_cache_says(model):
    """The mean over drawn bytes of what they cost more behind a sample of the cache."""
    config = leaderboard_config.get_config("tiny")
    work = works.Work(config)
    found = work.compressed("uniform", "code", 8, 0)
    assert np.all(found["continuation_divergence"] > 0)
    assert np.all(found["repeated_divergence"] > 0)
    texts, length = work.texts("code"), config.prompt_bytes
    coreset = whole_cache(texts.keys[0], texts.values[0])
    same = work._losses("code", [coreset])
    assert np.all(np.abs(same["continuation_divergence"]) < 1e-4)
    assert np.all(np.abs(same["repeated_divergence"]) < 1e-4)
    np.testing.assert_allclose(same["continuation"], work.exact("code")["continuation"], atol=1e-3)
    # Bytes drawn from the full cache's own predictions, given the text before each of them.
    exact = work.expected("code")["continuation"]
    draws = jax.random.categorical(jax.random.key(0), exact, shape=(200, *exact.shape[:-1]))
    compressor = METHODS["uniform"].compressor(1)
    rng = jax.random.fold_in(jax.random.key(0), 0)
    coreset = compressor(rng, texts.keys[0], texts.values[0], size=-(-length // 8))
    caches = decoding.behind_coresets(
        jax.tree.map(lambda leaf: leaf[:, None], coreset), length, config.continuation_bytes
    )
    parts = decoding.predictions(
        work.model, caches, texts.tokens[:, length:], texts.tokens[:, length - 2 : length]
    )
    heard = np.concatenate([part for part, _ in parts], axis=1)
    lost = np.take_along_axis(exact - heard, np.asarray(draws).transpose(1, 2, 0), -1) / np.log(2)
    error = lost.std() / np.sqrt(lost.size)
    assert abs(lost.mean() - found["continuation_divergence"][0]) < 5 * error


def test_queries_to_fit_to_and_queries_asked_are_of_different_bytes(model):
    tokens = passages("tables", 2, 120, 0)
    texts = works.read_texts(model, tokens, 80, 20)
    queries = lm.caches(model, tokens[1]).queries
    for head in range(2):
        # One query head of the group after the other.
        for member in range(2):
            fitting = texts.fitting[1, :, head, 20 * member : 20 * (member + 1)]
            asked = texts.asked[1, :, head, 40 * member : 40 * (member + 1)]
            np.testing.assert_array_equal(fitting, queries[:, 2 * head + member, 60:80])
            np.testing.assert_array_equal(asked, queries[:, 2 * head + member, 80:])
    np.testing.assert_allclose(
        texts.exact[1], cj.attention(texts.asked[1], texts.keys[1], texts.values[1]), atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_what_their_kind_says(kind):
    tokens = passages(kind, 4, 3000, 0)
    assert tokens.shape == (4, 3000)
    assert len({row.tobytes() for row in tokens}) == 4
    np.testing.assert_array_equal(tokens, passages(kind, 4, 3000, 0))
    for row in tokens:
        text = row.astype(np.uint8).tobytes()
        if kind == "tables":
            assert text.count(b"->") > 40
        if kind == "prose":
            assert text.count(b"\\n") < 20 < text.count(b"\n")


def test_texts_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="kinds"):
        passages("verse", 1, 100, 0)
    for kind in ("prose", "tables"):
        with pytest.raises(ValueError, match="passages of"):
            passages(kind, 100, 100_000, 0)


def test_the_table_of_methods():
    every = [method for method in METHODS.values() if method.category != PLAIN]
    assert chosen(None) == ENTRANTS == tuple(every)
    assert len({method.label for method in METHODS.values()}) == len(METHODS)
    for method in ENTRANTS:
        assert method.category in CATEGORIES
        assert set(method.traits.split()) <= TRAITS
        assert (method.bits is not None) == (method.category == QUANTIZED)
        assert " at 0x" not in identity(method.compressor())
    for names in (("balanced",), ("uniform", "no_such_method"), ("uniform", "window")):
        with pytest.raises(ValueError, match="uniform"):
            chosen(names)
    for method in METHODS.values():
        if method.category == PLAIN:
            with pytest.raises(ValueError, match="plain cache"):
                method.compressor()


@pytest.mark.slow
@pytest.mark.parametrize("name", [method.name for method in ENTRANTS])
def test_methods_are_what_their_traits_say(name):
    method, count, size = METHODS[name], 64, 16
    # Two layers of a head each.
    keys, values, queries = NORMAL(jax.random.key(0), (3, 2, 1, count, 8))
    compressor = method.compressor(2)

    def compress(seed, queries):
        kept = count if method.has("whole") else size
        return compressor(jax.random.key(seed), keys, values, size=kept, queries=queries)

    if method.asks:
        with pytest.raises(ValueError, match="queries"):
            compress(0, None)
    else:
        queries = None
    first, second = compress(0, queries), compress(1, queries)
    changed = any(
        not np.array_equal(*pair)
        for pair in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    assert method.has("draws") or not changed
    kept, held = first.indices[..., None], np.isfinite(first.log_weights)
    assert held.sum() <= 2 * (count if method.has("whole") else size)
    for source, found in ((keys, first.keys), (values, first.values)):
        same = np.array_equal(jnp.take_along_axis(source, kept, axis=-2)[held], found[held])
        assert same or not method.has("subset")


@pytest.mark.parametrize("ratio", [2, 4, 8, 32])
def test_quantized_caches_fit_into_their_share_of_the_bytes(ratio):
    count, width = 512, 16
    keys, values = NORMAL(jax.random.key(0), (2, count, width))
    budget = (keys.nbytes + values.nbytes) / ratio
    for method in (method for method in ENTRANTS if method.bits is not None):
        try:
            size = works.pairs_kept(method, count, width, ratio)
        except ValueError:
            continue
        assert size == count or not method.has("whole")

        def weight(size, method=method):
            coreset = whole_cache(keys[:size], values[:size])
            if not method.has("whole"):
                weights = jnp.arange(size, dtype=jnp.float32)
                coreset = coreset._replace(log_weights=weights)
            return coreset_bytes(coreset, method.bits)

        assert weight(size) <= budget
        assert method.has("whole") or weight(size + 1) > budget


def test_bytes_count_what_answers_depend_on():
    coreset = whole_cache(jnp.zeros((2, 8, 4)), jnp.zeros((2, 8, 3)))
    assert coreset_bytes(coreset) == 2 * 8 * 7 * 4
    # One number a head.
    flat = coreset._replace(log_weights=jnp.zeros((2, 8)) + jnp.arange(2.0)[:, None])
    assert coreset_bytes(flat) == 2 * 8 * 7 * 4
    weighted = coreset._replace(log_weights=jnp.zeros((2, 8)).at[0, 0].set(1.0))
    assert coreset_bytes(weighted) == 2 * 8 * 8 * 4
    signed = cj.baselines.SignedCoreset(*weighted[:4], jnp.ones((2, 8)))
    assert coreset_bytes(signed) == 2 * 8 * 9 * 4
    # A slot that holds nothing takes nothing.
    empty = jnp.zeros((2, 8)).at[1, 6:].set(-jnp.inf)
    assert coreset_bytes(coreset._replace(log_weights=empty)) == 14 * 7 * 4
    weighted = coreset._replace(log_weights=empty.at[0, 0].set(1.0))
    assert coreset_bytes(weighted) == 14 * 8 * 4


@pytest.mark.slow
def test_errors_are_relative_to_the_mean_norm_of_a_head():
    keys, values, queries = NORMAL(jax.random.key(0), (3, 2, 40, 8))
    coreset = cj.baselines.uniform()(jax.random.key(1), keys, values, size=10)
    exact = cj.attention(queries, keys, values)
    found = relative_error(queries, exact, coreset)
    for head in range(2):
        errors = np.linalg.norm(cj.attend(queries, coreset)[head] - exact[head], axis=-1)
        norm = np.linalg.norm(exact[head], axis=-1).mean()
        np.testing.assert_allclose(found[head], errors / norm, rtol=1e-4)


def test_cells_name_what_they_depend_on():
    config = leaderboard_config.get_config("quick")
    found = leaderboard.cells(config)
    assert len({str(cell) for cell in found}) == len(found)
    drawing = sum(method.has("draws") for method in ENTRANTS)
    config.seeds = (0, 1, 2)
    more = leaderboard.cells(config)
    assert len(more) - len(found) == 2 * drawing * len(config.kinds) * len(config.ratios)
    # Finished cells stay finished where seeds are added.
    assert {str(cell) for cell in found} <= {str(cell) for cell in more}


def test_bad_configurations_are_refused():
    for change in (
        {"ratio": 3},
        {"ratios": (1, 8)},
        {"fitting_bytes": 5000},
        {"continuation_bytes": 10},
        {"seeds": ()},
    ):
        config = leaderboard_config.get_config()
        config.update(change)
        with pytest.raises(ValueError, match=next(iter(change))):
            leaderboard.check(config)


@pytest.mark.slow
def test_a_method_that_fails_is_a_dash_and_the_others_go_on(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory\nat great length")

    config = leaderboard_config.get_config("tiny")
    broken = Method("broken", "broken", FREE, "", lambda: fails)
    monkeypatch.setitem(METHODS, "broken", broken)
    work = works.Work(config)
    assert work.compressed("broken", "code", 2, 0) == {"failed": "out of memory"}
    exact = {"method": "exact", "kind": "code"}
    cell = {"method": "broken", "kind": "code", "ratio": 2, "seed": 0}
    figures = {"continuation": [1.0], "repeated": [1.0], "bytes": 8}
    board = gather([(exact, figures), (cell, {"failed": "out of memory"})], (broken,))
    assert board.failures == {("broken", 2): "out of memory"}
    assert not board.entries


@pytest.mark.slow
def test_job_and_its_resumption(tmp_path: pathlib.Path, monkeypatch):
    config = leaderboard_config.get_config("tiny")
    config.output = str(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        board = leaderboard.run(config)
    for name in config.methods:
        assert METHODS[name].title in printed.getvalue()
    lines = (tmp_path / "leaderboard.jsonl").read_text().splitlines()
    assert len(lines) == len(leaderboard.cells(config))
    assert all(json.loads(line)["measurements"] for line in lines)
    for name in ("leaderboard.png", "pareto.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    # Half of the cache tells more than an eighth, and WildCat's bins do not divide 25.
    errors = [board.entries["balanced", ratio].mean.mean() for ratio in (2, 8)]
    assert errors[0] < errors[1]
    assert "multiple of bins" in board.failures["wildcat_4", 8]
    # Finished cells are not measured again.
    monkeypatch.setattr(leaderboard, "Work", None)
    with contextlib.redirect_stdout(io.StringIO()) as again:
        leaderboard.run(config)
    assert again.getvalue() == printed.getvalue()
