"""Settings of `experiments.caches.feasibility`: the default and, for tests, `:tiny`."""

import ml_collections

from configs import compress_cache


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"default"` or `"tiny"`.

    Returns:
      The configuration that `experiments.caches.feasibility` reads; `text`, `checkpoint`,
      `prefix_bytes` and `query_bytes` are those of `experiments.caches.compress_cache`.

    Raises:
      ValueError: `variant` is neither.
    """
    if variant not in ("default", "tiny"):
        raise ValueError(f"variant must be 'default' or 'tiny', got {variant!r}")
    config = compress_cache.get_config(variant)
    config.output = "outputs/feasibility"
    config.seeds = (0,)
    # Compute every cell again, as after a change to the library that kept its version.
    config.fresh = False
    # Balls of queries to certify, as shares of the largest norm that the model asks with.
    config.shares = (0.0625, 0.125, 0.25, 0.5, 1.0)
    if variant == "default":
        config.prefix_bytes = 4096
    if variant == "tiny":
        config.output = "outputs/feasibility_tiny"
        config.prefix_bytes = 256
        config.ratios = (4,)
        config.ratio = 4
        config.shares = (0.1, 1.0)
    return config
