"""Caches of the shipped model: wide channels cost nothing, and samples make no head worse."""

import jax
import numpy as np
import pytest

import coreset_jax as cj
from experiments.common.metrics import relative_error
from experiments.leaderboard import texts
from experiments.leaderboard.work import read_texts
from experiments.model import lm
from tests.wide_pairs import WideHead, with_wide_pair

PROMPT, SAMPLED, ASKED = 4096, 1024, 512


@pytest.fixture(scope="module")
def cache():
    """Keys and values of all heads, queries of the end of the prompt, and those behind it."""
    model, config = lm.load(None)
    found = read_texts(model, texts.passages("code", 1, PROMPT + ASKED, 0), PROMPT, SAMPLED)
    return WideHead(found.keys[0], found.values[0], found.fitting[0], found.asked[0]), config


def errors(head, compressor, samples=None):
    coreset = compressor(jax.random.key(0), *head[:2], size=PROMPT // 8, queries=samples)
    exact = cj.attention(head.asked, head.keys, head.values, block_size=2048)
    return np.mean(relative_error(head.asked, exact, coreset), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("pair", [0, 16, 31])
def test_a_wide_pair_costs_next_to_nothing(cache, pair):
    head, config = cache
    group = head.asked.shape[-2] // ASKED
    places = np.arange(PROMPT - SAMPLED, PROMPT), np.arange(PROMPT, PROMPT + ASKED)
    places = tuple(np.tile(each, group) for each in places)
    both = with_wide_pair(head, pair, base=config.rope_base, query_positions=places)
    for compressor, sampled in [(cj.fitted(), False), (cj.fitted(), True), (cj.balanced(), False)]:
        wide, plain = (errors(each, compressor, each.samples if sampled else None) for each in both)
        assert np.exp(np.mean(np.log(wide / plain))) < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 8, 128, 2048])
def test_samples_make_no_head_worse(cache, count):
    head, _ = cache
    ratios = errors(head, cj.fitted(), head.samples[..., -count:, :]) / errors(head, cj.fitted())
    # Sixteen judges are few: those of one head of a group, and neighbors.
    assert np.max(ratios) < 1.15
    assert np.exp(np.mean(np.log(ratios))) < 1.02
