"""Kernel halving against its authors' code, and against the formulas written out slowly."""

import json
import math
import pathlib

import jax
import numpy as np
import pytest

from coreset_jax import baselines
from coreset_jax.baselines.kernel_halving import halvings, rounds

run_halvings = jax.jit(halvings, static_argnames=("size", "scale", "delta"))

FIGURES = json.loads(
    pathlib.Path(__file__).with_name("kernel_methods.json").read_text(encoding="utf-8")
)


def figures(kind, **settings):
    settings = {"method": "kernel_halving", **settings}
    return [row for row in FIGURES[kind] if settings.items() <= row.items()]


def halvings_by_hand(keys, values, uniforms, coins, size, delta):
    """The rule, pair by pair: order and weights of what is left."""
    schedule = rounds(len(keys), size)
    keys = keys / len(keys[0]) ** 0.25
    shift, offset = max(key @ key for key in keys), np.abs(values).max() ** 2
    order, weights = list(range(len(keys))), [1] * len(keys)

    def kernel(i, j):
        return math.exp(keys[i] @ keys[j] - shift) * (values[i] @ values[j] + offset)

    def product(a, b):
        pairs = [(1, a[0], b[0]), (-1, a[0], b[1]), (-1, a[1], b[0]), (1, a[1], b[1])]
        return sum(sign * kernel(i, j) for sign, i, j in pairs)

    for this, numbers, coin in zip(schedule, uniforms, coins, strict=True):
        target = max(math.ceil(len(order) / 2), size)
        halved = 2 * (len(order) - target)
        failure = this.bucket**2 * delta / (schedule[0].bucket * len(schedule) * len(keys))
        spread = 0.5 + math.log(2 * this.bucket / failure)
        left = []
        for start in range(0, halved, this.bucket):
            stop = min(start + this.bucket, halved)
            pairs = [(order[i], order[i + 1]) for i in range(start, stop, 2)]
            signs, largest = [], 0.0
            for a, pair in enumerate(pairs):
                length = math.sqrt(max(product(pair, pair), 0))
                largest = max(largest, length)
                threshold = length * largest * spread * (2 * numbers[start // 2 + a] - 1)
                pull = sum(signs[b] * product(pair, pairs[b]) for b in range(a))
                signs.append(-1 if a > 0 and threshold <= pull else 1)
            tossed = 1 if coin < 0.5 else 0
            left += [
                pair[tossed if sign > 0 else 1 - tossed]
                for pair, sign in zip(pairs, signs, strict=True)
            ]
        merged = [weights[i] + weights[i + 1] for i in range(0, halved, 2)]
        order, weights = left + order[halved:], merged + weights[halved:]
    return order, weights


def draw(count, size, seed):
    rng = np.random.default_rng(seed)
    drawn = [(rng.random(each.pairs), rng.random()) for each in rounds(count, size)]
    uniforms, coins = zip(*drawn, strict=True)
    return list(uniforms), np.array(coins)


# Odd numbers, short buckets, and a last halving of a part; then padding, which needs one halving
# more. As the authors' code has it, sizes are powers of two: see the test below.
@pytest.mark.parametrize("padding", [0, 13])
def test_agrees_with_the_rule_written_out(x64, padding):
    length, size = 51, 7
    rng = np.random.default_rng(length)
    keys, values = 2 * rng.standard_normal((2, length, 6))
    uniforms, coins = draw(length, size, seed=3)
    order, weights = halvings_by_hand(keys, values, uniforms, coins, size, delta=0.5)
    # A head with padding goes through the halvings of its own length, the last of the schedule.
    late = rounds(length + padding, size)
    kept = run_halvings(
        np.pad(keys, ((0, padding), (0, 0))),
        np.pad(values, ((0, padding), (0, 0))),
        [
            np.resize(numbers, each.pairs)
            for numbers, each in zip(
                [uniforms[0]] * (len(late) - len(uniforms)) + uniforms, late, strict=True
            )
        ],
        np.resize(coins[::-1], len(late))[::-1],
        length,
        size=size,
        scale=6**-0.5,
        delta=0.5,
    )
    assert int(kept.filled) == size == len(order)
    np.testing.assert_array_equal(kept.order, order)
    np.testing.assert_array_equal(kept.weights, weights)


@pytest.mark.slow
def test_reproduces_the_published_code(x64, instances):
    checkpoints = figures("checkpoints")
    assert {checkpoint["instance"] for checkpoint in checkpoints} == set(instances)
    uniforms, coins = draw(4096, 128, seed=7)
    for checkpoint in checkpoints:
        instance = instances[checkpoint["instance"]]
        keys, values = (array.astype(np.float64) for array in instance[:2])
        options = {"size": 128, "scale": 32**-0.5, "delta": 0.5}
        kept = run_halvings(keys, values, uniforms, coins, 4096, **options)
        # Of copies the checkpoint names the first.
        _, firsts, copies = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        order = np.asarray(kept.order)
        np.testing.assert_array_equal(firsts[copies[order]], checkpoint["order"])
        np.testing.assert_array_equal(kept.weights, 32)
        error = instance.error(keys[order], values[order], np.zeros(128))
        np.testing.assert_allclose(error, checkpoint["error"]["mean"], rtol=1e-9)


@pytest.mark.parametrize("size", [20, 59])
def test_weights_sum_to_every_length(size):
    count = 100
    keys, values = np.random.default_rng(5).standard_normal((2, count, count, 4), np.float32)
    lengths = np.arange(1, count + 1)
    compressor = baselines.kernel_halving()
    coreset = compressor(jax.random.key(0), keys, values, size=size, lengths=lengths)
    weights = np.exp(np.asarray(coreset.log_weights, np.float64))
    np.testing.assert_allclose(weights.sum(axis=-1), lengths, rtol=1e-6)
    np.testing.assert_array_equal((weights > 0).sum(axis=-1), np.minimum(size, lengths))


def test_bad_options_are_refused():
    for delta, message in ((0.0, "delta must be positive"), (np.ones(3), "delta must be a scalar")):
        with pytest.raises(ValueError, match=message):
            baselines.kernel_halving(delta=delta)
