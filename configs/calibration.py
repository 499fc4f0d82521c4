"""Settings of `experiments.questions.calibration`: `:full` and, for tests, `:tiny`."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"full"`, or `"tiny"`, a short text.

    Returns:
      The configuration that `experiments.questions.calibration` reads.

    Raises:
      ValueError: `variant` is neither.
    """
    if variant not in ("full", "tiny"):
        raise ValueError(f"variant must be 'full' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/calibration"
    # A GGUF file or a Hugging Face folder; None is SmolLM2-135M-Instruct, of `make models`.
    config.model = config_dict.placeholder(str)
    # Of weights and activations: float32 or bfloat16.
    config.dtype = "float32"
    # The text: a passage of prose, code or tables, of so many tokens.
    config.kind = "prose"
    config.split = "tuning"
    config.passage = 0
    config.passage_tokens = 3584
    # Budgets are those of a cache compressed so many times.
    config.ratio = 8
    config.seed = 0
    if variant == "tiny":
        config.output = "outputs/calibration_tiny"
        config.kind = "code"
        config.passage_tokens = 256
    return config
