"""Heads with a pair of channels in which keys have a long bias and queries next to nothing.

Pretrained models that add a bias to their keys, as Qwen 2.5 does, have norms of some hundreds in a
pair of channels. The rotation of rotary positions turns it with the position: cached keys lie on a
circle. Scores stay moderate all the same, since queries are small there.
"""

from typing import NamedTuple

import numpy as np

BIAS = 300.0


class WideHead(NamedTuple):
    """Keys and values ``[n, d]``, and queries of later positions in two parts ``[q, d]``."""

    keys: np.ndarray
    values: np.ndarray
    samples: np.ndarray
    asked: np.ndarray


def frequencies(width, base=10_000.0):
    return base ** (-np.arange(width // 2) / (width // 2))


def turned(rows, positions, base=10_000.0):
    """Rows ``[..., n, d]`` turned by rotary positions, in float64."""
    angles = np.asarray(positions)[:, None] * frequencies(rows.shape[-1], base)
    first, second = np.split(np.asarray(rows, np.float64), 2, axis=-1)
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def smooth_head(count, width, *, seed=0, samples=256, asked=128):
    """A head whose keys and values follow a text that drifts from topic to topic."""
    rng = np.random.default_rng(seed)
    total = count + samples + asked
    topics = rng.normal(size=(total // 32 + 2, width))
    places = np.arange(total) / 32
    whole, part = places.astype(int), (places % 1)[:, None]
    content = (1 - part) * topics[whole] + part * topics[whole + 1]
    content = content + 0.5 * rng.normal(size=(total, width))
    mean = rng.normal(size=width)
    keys = turned(content + mean, np.arange(total))
    queries = turned(content @ (rng.normal(size=(width, width)) / width**0.5) + mean, range(total))
    values = np.tanh(content @ (rng.normal(size=(width, width)) / width**0.5))
    parts = np.split(queries[count:], [samples])
    return WideHead(keys[:count], values[:count], *parts)


def with_wide_pair(head, pair, *, score=0.0, base=10_000.0, bias=BIAS, query_positions=None):
    """The head with a bias in a pair of channels, and the same head without it.

    Args:
      head: arrays ``[..., n, d]``; queries ``[..., q, d]``.
      pair: number of the frequency; channels ``pair`` and ``pair + d / 2``.
      score: what queries add to scores there, at most: they are so long in the pair.
      base: of the rotary frequencies.
      bias: norm of the bias.
      query_positions: positions of samples and of the queries asked ``[q]`` each; ``None`` for
        those behind the pairs.
    """
    count, width = head.keys.shape[-2:]
    channels = [pair, pair + width // 2]
    direction = np.zeros(width)
    direction[channels] = np.cos(0.7), np.sin(0.7)
    if query_positions is None:
        first = count + head.samples.shape[-2]
        query_positions = np.arange(count, first), first + np.arange(head.asked.shape[-2])
    norm = score * width**0.5 / bias

    def narrow(queries, positions):
        queries = np.array(queries, np.float64)
        queries[..., channels] = 0
        return queries + turned(np.tile(norm * direction, (len(positions), 1)), positions, base)

    samples, asked = (
        narrow(each, places)
        for each, places in zip((head.samples, head.asked), query_positions, strict=True)
    )
    plain = WideHead(head.keys, head.values, samples, asked)
    turns = turned(np.tile(bias * direction, (count, 1)), np.arange(count), base)
    wide = plain._replace(keys=np.asarray(head.keys, np.float64) + turns)
    return tuple(WideHead(*(each.astype(np.float32) for each in some)) for some in (wide, plain))
