"""The largest attention weights of pairs and what they keep, in float64 NumPy."""

import numpy as np

from tests.brute_force import double


def attention_weights(queries, keys, *, scale=None, log_others=None):
    """Attention weights ``[q, n]`` of one head, with what queries attend to beside it."""
    queries, keys = double(queries, keys)
    logits = (keys.shape[-1] ** -0.5 if scale is None else scale) * queries @ keys.T
    highest = logits.max(axis=-1, keepdims=True)
    masses = np.exp(logits - highest)
    others = 0 if log_others is None else np.exp(double(log_others)[0][:, None] - highest)
    return masses / (masses.sum(axis=-1, keepdims=True) + others)


def largest_weights(queries, keys, lengths=None, **options):
    """The largest attention weight of each pair of heads ``[..., n]``; minus one in padding."""
    found = np.full(keys.shape[:-1], -1.0)
    for head in np.ndindex(*keys.shape[:-2]):
        length = keys.shape[-2] if lengths is None else lengths[head]
        weights = attention_weights(queries[head], keys[head][:length], **options)
        found[head][:length] = weights.max(axis=0)
    return found


def kept_of(scores, lengths, *, sinks, recent, mean, most=None):
    """The pairs that heads ``[h, n]`` of one budget keep: both ends, then the largest scores.

    Args:
      scores: one for each pair, all different; those of padding are not looked at.
      lengths: valid pairs of each head.
      sinks: first pairs that are kept.
      recent: last pairs that are kept.
      mean: pairs that are kept, for each head in the mean.
      most: and by one head, at most.
    """
    heads, count = scores.shape
    most = count if most is None else most
    kept = [set() for _ in range(heads)]
    for head in range(heads):
        length = lengths[head]
        kept[head] |= set(range(min(sinks, length))) | set(range(max(length - recent, 0), length))
    ranked = [
        (-scores[head, pair], head, pair) for head in range(heads) for pair in range(lengths[head])
    ]
    for _, head, pair in sorted(ranked):
        if sum(map(len, kept)) < heads * mean and len(kept[head]) < most:
            kept[head].add(pair)
    return [np.array(sorted(pairs)) for pairs in kept]
