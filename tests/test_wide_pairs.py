"""A pair of channels in which keys are wide and queries blind costs nothing, wherever it lies."""

import jax
import numpy as np
import pytest

import coreset_jax as cj
from tests.wide_pairs import WideHead, smooth_head, with_wide_pair

HEADS = 4


def errors(compressor, head, ratio, sampled=False):
    """Relative error of attention over queries that are no samples, one a head."""
    exact = cj.attention(head.asked, head.keys, head.values)
    size = head.keys.shape[-2] // ratio
    samples = head.samples if sampled else None
    coreset = compressor(jax.random.key(0), head.keys, head.values, size=size, queries=samples)
    missed = np.linalg.norm(cj.attend(head.asked, coreset) - exact, axis=-1)
    return missed.mean(axis=-1) / np.linalg.norm(exact, axis=-1).mean(axis=-1)


def ratio_of(compressor, heads, ratio, **options):
    """Geometric mean over heads of the error with the bias over the one without."""
    logs = [np.log(errors(compressor, head, ratio, **options)) for head in heads]
    return float(np.exp(np.mean(logs[0] - logs[1])))


def heads_of(count, width, **options):
    several = [smooth_head(count, width, seed=seed, **options) for seed in range(HEADS)]
    return WideHead(*(np.float32(each) for each in map(np.stack, zip(*several, strict=True))))


def test_the_default_on_short_heads():
    heads = heads_of(256, 32, samples=8, asked=64)
    for pair in (0, 8, 15):
        assert ratio_of(cj.fitted(), with_wide_pair(heads, pair), 4) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("width", [64, 128])
def test_all_methods_on_long_heads(width):
    heads = heads_of(4096, width, samples=512)
    for pair in (0, width // 4, width // 2 - 1):
        both = with_wide_pair(heads, pair)
        assert ratio_of(cj.fitted(), both, 8) < 1.1
        assert ratio_of(cj.fitted(), both, 8, sampled=True) < 1.1
        assert ratio_of(cj.balanced(), both, 8) < 1.1
        assert ratio_of(cj.attended(), both, 8, sampled=True) < 1.1


@pytest.mark.slow
def test_a_wide_channel_of_its_own_stays_what_it_was():
    """Keys are no circle there, and nobody can know that queries are blind."""
    heads = heads_of(1024, 64, samples=256)
    wide = heads._replace(**{name: np.array(getattr(heads, name)) for name in heads._fields})
    wide.keys[..., 5] *= 30
    sharp = [errors(cj.fitted(), wide, 8), errors(cj.baselines.uniform(), wide, 8)]
    assert np.all(sharp[0] < 0.5 * sharp[1])
    # Samples know: with queries smaller by as much, scores are what they were.
    for name in ("samples", "asked"):
        getattr(wide, name)[..., 5] /= 30
    assert ratio_of(cj.fitted(), (wide, heads), 8, sampled=True) < 1.3
