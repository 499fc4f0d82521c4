"""What the library computes, in float64 NumPy and in the plainest way."""

import numpy as np


def double(*arrays):
    return tuple(np.asarray(array).astype(np.float64) for array in arrays)


def attention(
    queries,
    keys,
    values,
    log_weights=None,
    *,
    scale=None,
    normalizers=None,
    soft_cap=None,
    sink_logits=None,
):
    """Weighted softmax attention; a pair of weight zero is left out whatever it holds.

    With ``sink_logits`` ``[..., q]`` queries have one more pair each, of value zero.
    """
    queries, keys, values = double(queries, keys, values)
    scale = keys.shape[-1] ** -0.5 if scale is None else scale
    log_weights = np.zeros(keys.shape[:-1]) if log_weights is None else np.asarray(log_weights)
    normalizers = np.ones(keys.shape[:-1]) if normalizers is None else np.asarray(normalizers)
    outputs = np.zeros((*queries.shape[:-1], values.shape[-1]))
    for head in np.ndindex(*keys.shape[:-2]):
        inside = ~np.isneginf(log_weights[head])
        logits = scale * queries[head] @ keys[head][inside].T
        if soft_cap is not None:
            logits = soft_cap * np.tanh(logits / soft_cap)
        logits = logits + log_weights[head][inside]
        most = logits.max(axis=-1, keepdims=True)
        masses = np.exp(logits - most)
        total = masses @ normalizers[head][inside]
        if sink_logits is not None:
            total = total + np.exp(double(sink_logits[head])[0] - most[:, 0])
        outputs[head] = masses @ values[head][inside] / total[:, None]
    return outputs


def unit_problem(keys, values):
    """Centered and scaled keys and values of one head."""
    keys, values = double(keys, values)
    keys, values = keys - keys.mean(axis=0), values - values.mean(axis=0)
    keys = keys / np.linalg.norm(keys, axis=1).max()
    return keys, values / np.linalg.norm(values, axis=1).max()


def gram(keys, values, radius, right_keys=None, right_values=None, *, key_weight=0.0):
    """Numerator, denominator and keys at once, scaled so that no pair has a norm above one."""
    keys, values = double(keys, values)
    if right_keys is None:
        right_keys, right_values = keys, values
    right_keys, right_values = double(right_keys, right_values)
    products = keys @ right_keys.T
    kernel = np.exp(radius * (products - 1))
    return (kernel * (values @ right_values.T + 1) + key_weight * products) / (2 + key_weight)
