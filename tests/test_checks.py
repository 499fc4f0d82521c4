"""Bad input is refused before tracing, by every entry point, with a message that says enough."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import coreset_jax as cj
from coreset_jax import coreset as coreset_module
from coreset_jax import problem

LEADING, COUNT, WIDTH, VALUE_WIDTH, SIZE = (2, 3), 12, 4, 5, 6
KEYS = np.zeros((*LEADING, COUNT, WIDTH), np.float32)
VALUES = np.zeros((*LEADING, COUNT, VALUE_WIDTH), np.float32)
QUERIES = np.zeros((*LEADING, 7, WIDTH), np.float32)


def compress_with(compressor):
    return lambda **arguments: compressor(jax.random.key(0), **arguments)


COMPRESSORS = {
    "compress": functools.partial(cj.compress, jax.random.key(0)),
    "balanced": compress_with(cj.balanced(block_size=4)),
    "uniform": compress_with(cj.baselines.uniform()),
    "balance_kv": compress_with(cj.baselines.balance_kv(block_size=4)),
}
TAKE_CACHES = {
    **{name: (function, {"size": SIZE}) for name, function in COMPRESSORS.items()},
    "attention": (cj.attention, {"queries": QUERIES}),
    "reduce": (problem.reduce, {}),
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


@pytest.mark.parametrize("bad", BAD_CACHES)
@pytest.mark.parametrize("name", TAKE_CACHES)
def test_keys_and_values_must_pair_up(name, bad):
    function, more = TAKE_CACHES[name]
    change, *fragments = BAD_CACHES[bad]
    arguments = {"keys": KEYS, "values": VALUES, **more, **change}
    refuses(lambda: function(**arguments), *fragments)


@pytest.mark.parametrize("name", TAKE_CACHES)
def test_both_shapes_are_named(name):
    function, more = TAKE_CACHES[name]
    arguments = {"keys": KEYS, "values": VALUES[..., 1:, :], **more}
    refuses(lambda: function(**arguments), "keys (2, 3, 12, 4)", "values (2, 3, 11, 5)")


@pytest.mark.parametrize("bad", BAD_LENGTHS)
@pytest.mark.parametrize("name", TAKE_CACHES)
def test_lengths_must_fit(name, bad):
    function, more = TAKE_CACHES[name]
    lengths, *fragments = BAD_LENGTHS[bad]
    call = functools.partial(function, keys=KEYS, values=VALUES, lengths=lengths, **more)
    refuses(call, "lengths", *fragments)


@pytest.mark.parametrize("size", [0, -1, True, 3.0, np.float32(3), "3", None])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_size_must_be_a_positive_int(name, size):
    call = functools.partial(COMPRESSORS[name], keys=KEYS, values=VALUES, size=size)
    refuses(call, "size must be", str(size))


def test_size_must_be_static():
    with pytest.raises(ValueError, match="size must be a static Python int"):
        jax.jit(lambda size: cj.compress(jax.random.key(0), KEYS, VALUES, size=size))(SIZE)


@pytest.mark.parametrize("bad", BAD_QUERIES)
def test_queries_must_fit(bad):
    queries, *fragments = BAD_QUERIES[bad]
    coreset = coreset_module.whole_cache(KEYS, VALUES)
    for call in (
        lambda: cj.compress(jax.random.key(0), KEYS, VALUES, size=SIZE, queries=queries),
        lambda: cj.attention(queries, KEYS, VALUES),
        lambda: cj.attend(queries, coreset),
        lambda: problem.reduce(KEYS, VALUES, queries=queries),
    ):
        refuses(call, "queries", *fragments)


@pytest.mark.parametrize("bad", NOT_POSITIVE)
@pytest.mark.parametrize("radius", ["rho", "query_norm", "kernel_radius"])
def test_radii_must_be_positive(radius, bad):
    compressor = cj.balanced(**{radius: NOT_POSITIVE[bad]})
    call = functools.partial(compressor, jax.random.key(0), KEYS, VALUES, size=SIZE)
    refuses(call, f"{radius} must be")


@pytest.mark.parametrize("radius", ["rho", "query_norm", "kernel_radius"])
def test_radii_must_be_one_or_one_a_head(radius):
    compressor = cj.balanced(**{radius: np.ones((3, 2))})
    call = functools.partial(compressor, jax.random.key(0), KEYS, VALUES, size=SIZE)
    refuses(call, radius, "(2, 3)", "(3, 2)")


def test_the_radius_is_named_once():
    refuses(
        lambda: cj.compress(jax.random.key(0), KEYS, VALUES, size=SIZE, rho=1.0, query_norm=1.0),
        "rho and query_norm",
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
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
    ],
)
def test_options_are_checked_where_they_are_given(option, value):
    refuses(lambda: cj.balanced(**{option: value}), f"{option} must be", repr(value))


@pytest.mark.parametrize(
    ("log_weights", "shape"), [(KEYS[..., 1:, 0], "(2, 3, 11)"), (KEYS[0, :, :, 0], "(3, 12)")]
)
def test_there_is_one_weight_a_pair(log_weights, shape):
    refuses(
        lambda: cj.attention(QUERIES, KEYS, VALUES, log_weights),
        f"log_weights {shape}",
        "keys (2, 3, 12, 4)",
    )


@pytest.mark.parametrize(
    ("indices", "fragments"),
    [
        (np.zeros((*LEADING, 5)), ["integer dtype", "float64"]),
        (np.zeros((*LEADING, 5), bool), ["integer dtype", "bool"]),
        (np.zeros((3, 5), int), ["indices (3, 5)", "keys (2, 3, 12, 4)"]),
        (np.zeros((3, 2, 5), int), ["indices (3, 2, 5)", "keys (2, 3, 12, 4)"]),
        ([0, 1], ["must be an array", "list"]),
    ],
)
def test_indices_are_integers_beside_the_keys(indices, fragments):
    weights = np.zeros(np.shape(indices), np.float32)
    refuses(
        lambda: coreset_module.gather(KEYS, VALUES, indices, weights), "indices must", *fragments
    )


def test_every_index_has_a_weight():
    indices = np.zeros((*LEADING, 5), int)
    refuses(
        lambda: coreset_module.gather(KEYS, VALUES, indices, KEYS[..., :4, 0]),
        "log_weights (2, 3, 4)",
        "indices (2, 3, 5)",
    )


def test_shapes_are_checked_under_a_trace():
    with pytest.raises(ValueError, match="as many pairs"):
        jax.eval_shape(cj.attention, QUERIES, KEYS, VALUES[..., 1:, :])


def test_traced_radii_and_lengths_pass():
    def compress(rho, lengths):
        return cj.compress(jax.random.key(0), KEYS, VALUES, size=SIZE, rho=rho, lengths=lengths)

    lengths = np.full(LEADING, 4)
    shapes = jax.eval_shape(compress, 2.0, lengths)
    assert shapes.keys.shape == (*LEADING, SIZE, WIDTH)
