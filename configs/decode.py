"""Settings of `experiments.decode.decode`: the default, `:demo` and, for tests, `:tiny`."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"default"`, `"demo"`, its short form, or `"tiny"`.

    Returns:
      The configuration that `experiments.decode.decode` reads.

    Raises:
      ValueError: `variant` is none of the three.
    """
    if variant not in ("default", "demo", "tiny"):
        raise ValueError(f"variant must be 'default', 'demo' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/decode"
    # Compute every cell again, as after a change to the library that kept its version.
    config.fresh = False
    # A model of experiments.model.train_lm; None is the shipped one.
    config.checkpoint = config_dict.placeholder(str)
    # The files to read: "heldout" for figures, "train" to tune.
    config.split = "heldout"
    config.seed = 0
    config.methods = ("window", "uniform", "balance_kv", "balanced", "fitted")

    # Prompts: so many files, read up to here, compressed, and read on for so many bytes.
    config.passages = 24
    config.prompt_bytes = 4096
    config.continuation_bytes = 512
    config.ratios = (2, 4, 8, 16, 32)
    # How much of a cache is recent pairs, kept exactly, where it has a middle.
    config.recent_share = 0.25
    config.block_size = 64

    # Streams: decoding from an empty cache under a fixed budget. 0 bytes leaves them out.
    config.stream_passages = 2
    config.stream_bytes = 8192
    config.stream_size = 1024

    # Speed: one sequence, so many pairs in the cache.
    config.speed_pairs = 16384
    config.speed_ratio = 8
    # Steps: a few times block_size, so that compressions are in the mean.
    config.speed_turns = 256

    if variant == "demo":
        config.output = "outputs/demo"
        config.passages = 3
        config.continuation_bytes = 256
        config.ratios = (4, 8)
        config.stream_bytes = 0
        config.speed_turns = 64
    if variant == "tiny":
        config.output = "outputs/decode_tiny"
        config.passages = 1
        config.prompt_bytes = 256
        config.continuation_bytes = 48
        config.ratios = (4,)
        config.methods = ("window", "fitted")
        config.block_size = 8
        config.stream_passages = 1
        config.stream_bytes = 128
        config.stream_size = 64
        config.speed_pairs = 256
        config.speed_turns = 8
    return config
