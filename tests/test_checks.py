"""Bad input is refused before tracing, by every entry point, with a message that says enough."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import geometry
from coreset_jax._src.core.coreset import gather, whole_cache
from tests.compressors import sampled

LEADING, COUNT, WIDTH, VALUE_WIDTH, SIZE = (2, 3), 12, 4, 5, 6
KEYS = np.zeros((*LEADING, COUNT, WIDTH), np.float32)
VALUES = np.zeros((*LEADING, COUNT, VALUE_WIDTH), np.float32)
QUERIES = np.zeros((*LEADING, 7, WIDTH), np.float32)


COMPRESS = {
    "compress": cj.compress,
    "balanced": cj.balanced(block_size=4),
    "sampled": sampled(),
    "chunked": cj.chunked(sampled(), chunk_size=3),
}
COMPRESSORS = {
    name: functools.partial(compress, jax.random.key(0)) for name, compress in COMPRESS.items()
}
TAKE_CACHES = {
    **{name: (function, {"size": SIZE}) for name, function in COMPRESSORS.items()},
    "attention": (cj.attention, {"queries": QUERIES}),
    "standardize": (geometry.standardize, {}),
}

BAD_CACHES = {
    "keys of rank 1": ({"keys": KEYS[0, 0, 0]}, "keys", "(4,)"),
    "values of another rank": ({"values": VALUES[0]}, "values", "(3, 12, 5)"),
    "fewer values": ({"values": VALUES[..., 1:, :]}, "values", "(2, 3, 11, 5)"),
    "other leading axes": ({"values": VALUES[:1]}, "values", "(1, 3, 12, 5)"),
    "no pairs": (
        {"keys": KEYS[..., :0, :], "values": VALUES[..., :0, :]},
        "must not be empty",
        "(2, 3, 0, 4)",
    ),
    "keys without width": ({"keys": KEYS[..., :0]}, "must not be empty", "(2, 3, 12, 0)"),
    "values without width": ({"values": VALUES[..., :0]}, "must not be empty", "(2, 3, 12, 0)"),
    "integer keys": ({"keys": KEYS.astype(int)}, "keys must have a floating dtype", "int64"),
    "integer values": ({"values": VALUES.astype(int)}, "values must have a floating", "int64"),
    "complex keys": ({"keys": KEYS.astype(complex)}, "keys must have a floating", "complex128"),
    "keys in a list": ({"keys": KEYS.tolist()}, "keys must be an array", "list"),
}
BAD_LENGTHS = {
    "float": (np.full(LEADING, 3.0), "integer dtype", "float64"),
    "bool": (np.full(LEADING, True), "integer dtype", "bool"),
    "zero": (np.zeros(LEADING, int), "1..12", "(2, 3, 12, 4)"),
    "too long": (np.full(LEADING, COUNT + 1), "1..12", "to 13"),
    "scalar": (3, "leading axes", "()"),
    "other leading axes": (np.full((3, 2), 3), "leading axes", "(3, 2)"),
}
BAD_QUERIES = {
    "another width": (QUERIES[..., 1:], "width", "(2, 3, 7, 3)"),
    "another rank": (QUERIES[0], "rank", "(3, 7, 4)"),
    "other leading axes": (QUERIES[:1], "leading axes", "(1, 3, 7, 4)"),
    "integers": (QUERIES.astype(int), "floating dtype", "int64"),
}
BAD_SCORES = {
    "one a query": (QUERIES[..., 0], "one for each pair", "(2, 3, 7)", "(2, 3, 12, 4)"),
    "one for all heads": (KEYS[0, 0, :, 0], "one for each pair", "(12,)"),
    "one a number": (KEYS, "one for each pair", "(2, 3, 12, 4)"),
    "integers": (KEYS[..., 0].astype(int), "floating dtype", "int64"),
    "no array": (0.5, "must be an array", "float"),
}
NOT_POSITIVE = {
    "zero": 0.0,
    "negative": -1.0,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "partly negative": np.array([[1.0, 1.0, 1.0], [1.0, -1.0, 1.0]]),
    "NaN array": jnp.full(LEADING, jnp.nan),
    "text": "2",
    "bool": True,
    "complex": 1j,
}


def refuses(call, *fragments):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call()
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("name", TAKE_CACHES)
def test_keys_and_values_must_pair_up(name):
    function, more = TAKE_CACHES[name]
    for change, *fragments in BAD_CACHES.values():
        arguments = {"keys": KEYS, "values": VALUES, **more, **change}
        refuses(functools.partial(function, **arguments), *fragments)
    # Both shapes are named.
    arguments = {"keys": KEYS, "values": VALUES[..., 1:, :], **more}
    shapes = "keys (2, 3, 12, 4)", "values (2, 3, 11, 5)"
    refuses(functools.partial(function, **arguments), *shapes)


@pytest.mark.parametrize("name", TAKE_CACHES)
def test_lengths_must_fit(name):
    function, more = TAKE_CACHES[name]
    for lengths, *fragments in BAD_LENGTHS.values():
        call = functools.partial(function, keys=KEYS, values=VALUES, lengths=lengths, **more)
        refuses(call, "lengths", *fragments)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_size_must_be_a_positive_static_int(name):
    call = functools.partial(COMPRESSORS[name], keys=KEYS, values=VALUES)
    for size in (0, -1, True, 3.0, np.float32(3), "3", None):
        refuses(functools.partial(call, size=size), "size must be", str(size))
    with pytest.raises(ValueError, match="size must be a static Python int"):
        jax.jit(lambda size: call(size=size))(SIZE)


def test_queries_must_fit():
    coreset = whole_cache(KEYS, VALUES)
    calls = [
        lambda queries, call=call: call(keys=KEYS, values=VALUES, size=SIZE, queries=queries)
        for call in COMPRESSORS.values()
    ]
    calls += [
        lambda queries: cj.attention(queries, KEYS, VALUES),
        lambda queries: cj.attend(queries, coreset),
        lambda queries: geometry.standardize(KEYS, VALUES, queries=queries),
    ]
    for queries, *fragments in BAD_QUERIES.values():
        for call in calls:
            refuses(functools.partial(call, queries), "queries", *fragments)


def test_scores_must_fit():
    for call in COMPRESSORS.values():
        call = functools.partial(call, keys=KEYS, values=VALUES, size=SIZE, queries=QUERIES)
        for scores, *fragments in BAD_SCORES.values():
            refuses(functools.partial(call, scores=scores), "scores", *fragments)
    # Not even where no method reads them; and not without the queries that they are of.
    sampled()(jax.random.key(0), KEYS, VALUES, size=SIZE, scores=KEYS[..., 0])
    call = functools.partial(COMPRESSORS["compress"], keys=KEYS, values=VALUES, size=SIZE)
    refuses(functools.partial(call, scores=KEYS[..., 0]), "scores need queries")


def test_radii_must_be_positive_and_one_or_one_a_head():
    for radius in ("rho", "query_norm", "kernel_radius"):
        for bad in NOT_POSITIVE.values():
            refuses(functools.partial(cj.balanced, **{radius: bad}), f"{radius} must be")
        compressor = cj.balanced(**{radius: np.ones((3, 2))})
        call = functools.partial(compressor, jax.random.key(0), KEYS, VALUES, size=SIZE)
        refuses(call, radius, "(2, 3)", "(3, 2)")
    # Where they are no options of a compressor.
    for radius in ("rho", "query_norm"):
        for call in (COMPRESSORS["compress"], geometry.standardize):
            more = {"size": SIZE} if call is not geometry.standardize else {}
            for bad in NOT_POSITIVE.values():
                given = {"keys": KEYS, "values": VALUES, radius: bad, **more}
                refuses(functools.partial(call, **given), f"{radius} must be")
    given = {"keys": KEYS, "values": VALUES, "rho": 1.0, "query_norm": 1.0}
    refuses(functools.partial(geometry.standardize, **given), "rho and query_norm")
    refuses(functools.partial(COMPRESSORS["compress"], size=SIZE, **given), "rho and query_norm")


def test_options_are_checked_where_they_are_given():
    for option, value in (
        ("block_size", 7),
        ("block_size", 0),
        ("block_size", 8.0),
        ("landmarks", 0),
        ("landmarks", True),
        ("max_swaps", -1),
        ("passes", 0),
        ("ridge", 0.0),
        ("ridge", float("nan")),
        ("scale", -1.0),
        ("walk", "greedy"),
    ):
        refuses(lambda: cj.balanced(**{option: value}), f"{option} must be", repr(value))  # noqa: B023


def test_there_is_one_weight_a_pair():
    for log_weights, shape in ((KEYS[..., 1:, 0], "(2, 3, 11)"), (KEYS[0, :, :, 0], "(3, 12)")):
        call = functools.partial(cj.attention, QUERIES, KEYS, VALUES, log_weights)
        refuses(call, f"log_weights {shape}", "keys (2, 3, 12, 4)")


def test_indices_are_integers_beside_the_keys():
    for indices, *fragments in (
        (np.zeros((*LEADING, 5)), "integer dtype", "float64"),
        (np.zeros((*LEADING, 5), bool), "integer dtype", "bool"),
        (np.zeros((3, 5), int), "indices (3, 5)", "keys (2, 3, 12, 4)"),
        (np.zeros((3, 2, 5), int), "indices (3, 2, 5)", "keys (2, 3, 12, 4)"),
        ([0, 1], "must be an array", "list"),
    ):
        weights = np.zeros(np.shape(indices), np.float32)
        call = functools.partial(gather, KEYS, VALUES, indices, weights)
        refuses(call, "indices must", *fragments)
    indices = np.zeros((*LEADING, 5), int)
    call = functools.partial(gather, KEYS, VALUES, indices, KEYS[..., :4, 0])
    refuses(call, "log_weights (2, 3, 4)", "indices (2, 3, 5)")


def test_shapes_are_checked_under_a_trace():
    with pytest.raises(ValueError, match="as many pairs"):
        jax.eval_shape(cj.attention, QUERIES, KEYS, VALUES[..., 1:, :])


@pytest.mark.slow
def test_traced_radii_and_lengths_pass():
    def compress(rho, lengths):
        compressor = cj.balanced(rho=rho, block_size=4)
        return compressor(jax.random.key(0), KEYS, VALUES, size=SIZE, lengths=lengths)

    shapes = jax.eval_shape(compress, 2.0, np.full(LEADING, 4))
    assert shapes.keys.shape == (*LEADING, SIZE, WIDTH)
