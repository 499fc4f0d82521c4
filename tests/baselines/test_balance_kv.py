"""BalanceKV against its authors' code, and against a slow version written from the formulas."""

import math

import jax
import numpy as np
import pytest

from coreset_jax import baselines
from coreset_jax.baselines.balance_kv import as_coreset, balance_kv, halvings, round_slots

run_halvings = jax.jit(halvings, static_argnames=("size", "scale", "options"))
run_as_coreset = jax.jit(as_coreset, static_argnames="options")


def halvings_by_hand(keys, values, uniforms, size, options):
    """The rule, pair by pair: order and weights of what is left."""
    scale = options.temperature / np.sqrt(keys.shape[-1])
    order, weights = list(range(len(keys))), [1.0] * len(keys)
    for numbers in uniforms:
        count = len(order)
        target = max(count // 2, min(count, size))
        halved = min(2 * (count - target), count)
        if halved == 0:
            break
        signs = []
        for start in range(0, halved, options.block_size):
            block = range(start, min(start + options.block_size, halved))
            rows = keys[[order[place] for place in block]]
            rows = rows - rows.sum(0) / (len(rows) if options.corrected else options.block_size)
            columns = np.stack([weights[place] * values[order[place]] for place in block])
            for i, place in enumerate(block):
                pull = 0.0
                for j in range(i):
                    kernel = math.exp(scale * (rows[i] @ rows[j]) - options.beta)
                    pull += kernel * (columns[i] @ columns[j] + 0.025 + 1e-8) * signs[start + j]
                signs.append(1 if i == 0 or numbers[place] < 0.5 - options.gamma * pull else -1)
        seen, cut = {1: 0, -1: 0}, None
        for place, sign in enumerate(signs):
            seen[sign] += 1
            if seen[sign] == halved // 2 and (cut is None or signs[cut] != sign):
                cut = place
        doubled = [place for place in range(cut + 1) if signs[place] != signs[cut]]
        chosen = [(place, 2.0) for place in doubled]
        chosen += [(place, 1.0) for place in range(cut + 1, count)]
        weights = [factor * weights[place] for place, factor in chosen[:target]]
        order = [order[place] for place, _ in chosen[:target]]
    return order, weights


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize(
    ("count", "length", "size", "block_size"),
    [
        (64, 64, 41, 16),  # Less than one halving.
        (50, 50, 7, 16),  # Odd counts, short blocks, and a last halving of a part.
        (50, 33, 7, 16),  # And padding, which needs one halving less.
        (50, 6, 7, 16),  # Nothing to do.
        (23, 23, 1, 64),  # A block longer than the cache.
    ],
)
def test_agrees_with_the_rule_written_out(x64, corrected, count, length, size, block_size):
    rng = np.random.default_rng(count + length)
    keys, values = 2 * rng.standard_normal((2, count, 6))
    uniforms = [rng.random(slots) for slots in round_slots(count, size)[:-1]]
    options = balance_kv(corrected=corrected, block_size=block_size, gamma=0.3, beta=0.1)
    order, weights = halvings_by_hand(keys[:length], values[:length], uniforms, size, options)
    kept = run_halvings(
        np.where(np.arange(count)[:, None] < length, keys, 0.0),
        np.where(np.arange(count)[:, None] < length, values, 0.0),
        uniforms,
        length,
        size=size,
        scale=6**-0.5,
        options=options,
    )
    assert int(kept.filled) == min(length, size) == len(order)
    np.testing.assert_array_equal(kept.order[: len(order)], order)
    np.testing.assert_array_equal(kept.weights[: len(order)], weights)
    assert not np.any(kept.weights[len(order) :])


@pytest.mark.parametrize(("block_size", "corrected"), [(128, False), (128, True), (256, False)])
def test_reproduces_the_published_code(x64, instances, balance_kv_figures, corrected, block_size):
    checkpoints = [
        checkpoint
        for checkpoint in balance_kv_figures["checkpoints"]
        if checkpoint["block_size"] == block_size
    ]
    assert {checkpoint["instance"] for checkpoint in checkpoints} == set(instances)
    for checkpoint in checkpoints:
        instance, size = instances[checkpoint["instance"]], checkpoint["size"]
        options = balance_kv(
            corrected=corrected, temperature=checkpoint["temperature"], block_size=block_size
        )
        rng = np.random.default_rng(7)
        uniforms = [rng.random(slots) for slots in round_slots(4096, size)[:-1]]
        keys, values = (array.astype(np.float64) for array in instance[:2])
        kept = run_halvings(
            keys, values, uniforms, 4096, size=size, scale=32**-0.5, options=options
        )
        np.testing.assert_array_equal(kept.order, checkpoint["order"])
        np.testing.assert_array_equal(kept.weights, checkpoint["weights"])
        coreset = run_as_coreset(kept, keys, values, 4096, options=options)
        expected = checkpoint["error_corrected" if corrected else "error_as_published"]
        np.testing.assert_allclose(instance.error(*coreset[:3]), expected["mean"], rtol=1e-9)


@pytest.mark.parametrize("name", ["smooth", "heavy", "medium"])
def test_instances_are_the_measured_ones(instances, balance_kv_figures, name):
    sums = balance_kv_figures["sums_of_squares"][name]
    for field, expected in sums.items():
        array = getattr(instances[name], field).astype(np.float64)
        np.testing.assert_allclose(np.sum(array**2), expected, rtol=1e-9)


@pytest.fixture(scope="module")
def compress_eight_times(instances):
    """Coresets of an instance by eight seeds, one a head."""

    def compress(name, corrected):
        keys, values = (np.broadcast_to(array, (8, *array.shape)) for array in instances[name][:2])
        compressor = baselines.balance_kv(corrected=corrected)
        return compressor(jax.random.key(0), keys, values, size=512)

    return compress


@pytest.mark.slow
def test_overflow_costs_the_large_keys_as_published_only(
    instances, compress_eight_times, published_error, mean_error
):
    norms = np.linalg.norm(instances["heavy"].keys, axis=-1)
    large = norms > 20
    for corrected, fewest, most in [(False, 0, 4), (True, 7, 17)]:
        coreset = compress_eight_times("heavy", corrected)
        kept = np.mean(np.sum(large[np.asarray(coreset.indices)], axis=-1))
        assert fewest <= kept <= most
        # The correction does in float32 what the authors' code does in float64.
        settings = {
            "method": "corrected" if corrected else "as published",
            "dtype": "float64" if corrected else "float32",
        }
        expected = published_error(instance="heavy", size=512, **settings)
        np.testing.assert_allclose(mean_error(instances["heavy"], coreset), expected, rtol=0.05)


def test_variants_walk_alike_and_weigh_apart(instances, compress_eight_times):
    published, corrected = (compress_eight_times("smooth", flag) for flag in (False, True))
    np.testing.assert_array_equal(published.indices, corrected.indices)
    np.testing.assert_allclose(published.log_weights, math.log(8), rtol=1e-6)
    weights = np.exp(corrected.log_weights)
    weights = 8 * weights / weights.max(axis=-1, keepdims=True)
    np.testing.assert_allclose(np.exp2(np.round(np.log2(weights))), weights, rtol=1e-5)
    np.testing.assert_allclose(
        published.values, corrected.values * (weights / 8)[..., None], rtol=1e-5
    )


@pytest.mark.parametrize("size", [13, 99])
def test_corrected_weights_sum_to_every_length(size):
    count = 100
    keys, values = np.random.default_rng(5).standard_normal((2, count, count, 4), np.float32)
    compressor = baselines.balance_kv(corrected=True, block_size=32)
    lengths = np.arange(1, count + 1)
    coreset = compressor(jax.random.key(0), keys, values, size=size, lengths=lengths)
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))
    np.testing.assert_allclose(weights.sum(axis=-1), lengths, rtol=1e-6)
    np.testing.assert_array_equal((weights > 0).sum(axis=-1), np.minimum(size, lengths))


@pytest.mark.slow
def test_options_that_say_the_same():
    keys, values = 3 * np.random.default_rng(5).standard_normal((2, 96, 16), np.float32)

    def kept(**options):
        compressor = baselines.balance_kv(block_size=32, **options)
        return compressor(jax.random.key(0), keys, values, size=48).indices

    default = kept()
    alike = kept(temperature=2.0, scale=0.125, gamma=8.0, beta=math.log(2))
    np.testing.assert_array_equal(alike, default)
    assert np.any(kept(temperature=0.1) != default)
    assert baselines.balance_kv(gamma=np.float32(4)) == baselines.balance_kv(gamma=4)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"corrected": 1}, "corrected must be True or False"),
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"block_size": 64.0}, "block_size must be a static Python int"),
        ({"gamma": -1.0}, "gamma must be positive"),
        ({"temperature": 0}, "temperature must be positive"),
        ({"temperature": np.ones(3)}, "temperature must be a scalar"),
        ({"beta": math.nan}, "beta must be finite"),
    ],
)
def test_bad_options_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        baselines.balance_kv(**option)
