"""Settings of `experiments.questions.ask`: `:demo` and, for tests, `:tiny`."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "demo") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"demo"`, or `"tiny"`, a short document and few methods.

    Returns:
      The configuration that `experiments.questions.ask` reads.

    Raises:
      ValueError: `variant` is neither.
    """
    if variant not in ("demo", "tiny"):
        raise ValueError(f"variant must be 'demo' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/ask"
    # A GGUF file or a Hugging Face folder; None is SmolLM2-135M-Instruct, of `make models`.
    config.model = config_dict.placeholder(str)
    # Of weights and activations: float32 or bfloat16.
    config.dtype = "float32"
    # A text file and a question about it; None is a document in which a number is hidden.
    config.text = config_dict.placeholder(str)
    config.question = config_dict.placeholder(str)
    # Names in experiments.questions.entrants.
    config.methods = (
        "uniform_ends",
        "streaming_llm",
        "snapkv",
        "kvzip",
        "attended",
        "attended_again",
    )
    config.ratio = 8
    config.seed = 0
    # Tokens of the document with the hidden number, and of a text file at most.
    config.tokens = 2048
    config.max_new_tokens = 32
    if variant == "tiny":
        config.output = "outputs/ask_tiny"
        config.methods = ("uniform_ends", "attended")
        config.tokens = 512
        config.max_new_tokens = 12
    return config
