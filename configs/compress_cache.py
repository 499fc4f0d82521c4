"""Settings of `experiments.caches.compress_cache`: the default, `:demo` and, for tests, `:tiny`."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"default"`, `"demo"`, which has a folder of its own, or `"tiny"`.

    Returns:
      The configuration that `experiments.caches.compress_cache` reads.

    Raises:
      ValueError: `variant` is none of the three.
    """
    if variant not in ("default", "demo", "tiny"):
        raise ValueError(f"variant must be 'default', 'demo' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/compress_cache"

    # The file to read, of any kind; None is a held-out file of Python's standard library.
    config.text = config_dict.placeholder(str)
    # A model of experiments.model.train_lm; None is the shipped one.
    config.checkpoint = config_dict.placeholder(str)

    # Bytes whose cache is compressed; None is as many as the file has, up to the cap.
    config.prefix_bytes = config_dict.placeholder(int)
    config.max_prefix_bytes = 16384
    # Bytes after the prefix whose queries are asked.
    config.query_bytes = 512

    # The table and the figure have these; the cache is kept at `ratio`, which joins them.
    config.ratios = (2, 4, 8, 16)
    config.ratio = 8
    config.seeds = (0, 1, 2)

    if variant == "demo":
        config.output = "outputs/demo"
    if variant == "tiny":
        config.output = "outputs/compress_cache_tiny"
        config.prefix_bytes = 512
        config.query_bytes = 64
        config.ratios = (2, 8)
        config.seeds = (0,)
    return config
