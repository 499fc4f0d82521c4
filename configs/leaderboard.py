"""Settings of `experiments.leaderboard.leaderboard`: `:full`, `:quick` and, for tests, `:tiny`."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"full"`, `"quick"`, a corner of it in minutes, or `"tiny"`.

    Returns:
      The configuration that `experiments.leaderboard.leaderboard` reads.

    Raises:
      ValueError: `variant` is none of the three.
    """
    if variant not in ("full", "quick", "tiny"):
        raise ValueError(f"variant must be 'full', 'quick' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/leaderboard"
    # Compute every cell again.
    config.fresh = False
    # A model of experiments.model.train_lm; None is the shipped one.
    config.checkpoint = config_dict.placeholder(str)
    # Names in experiments.common.methods; None is all of them.
    config.methods = config_dict.placeholder(tuple)
    config.ratios = (2, 4, 8, 16, 32)
    # What a method draws; one that draws nothing has the first of them alone.
    config.seeds = (0, 1, 2)

    # Texts: so many of each kind, chosen by this seed.
    config.kinds = ("code", "prose", "tables")
    config.passages = 3
    config.text_seed = 0
    # Bytes whose cache is compressed, and the bytes behind them, whose queries are asked.
    config.prompt_bytes = 4096
    config.continuation_bytes = 512
    # The last bytes of the prompt, whose queries query-informed methods are given.
    config.fitting_bytes = 1024
    # The ratio of the tables by kind of text, of losses in the verdict, and of subsets.
    config.ratio = 8

    if variant == "quick":
        config.output = "outputs/leaderboard_quick"
        config.ratios = (4, 8)
        config.seeds = (0,)
        config.passages = 1
    if variant == "tiny":
        config.output = "outputs/leaderboard_tiny"
        config.methods = (
            "uniform",
            "streaming_llm",
            "wildcat_4",
            "balanced",
            "nystrom",
            "top_attention",
            "quantized_4",
            "nystrom_8",
        )
        config.ratios = (2, 8)
        config.seeds = (0, 1)
        config.kinds = ("code", "tables")
        config.passages = 1
        # An eighth of them is no multiple of 4, which WildCat in 4 bins needs.
        config.prompt_bytes = 200
        config.continuation_bytes = 48
        config.fitting_bytes = 64
    return config
