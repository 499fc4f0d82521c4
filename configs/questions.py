"""Settings of `experiments.questions.board`: `:full`, `:quick` and, for tests, `:tiny`."""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"full"`, hours; `"quick"`, a corner of it in minutes; or `"tiny"`.

    Returns:
      The configuration that `experiments.questions.board` reads.

    Raises:
      ValueError: `variant` is none of the three.
    """
    if variant not in ("full", "quick", "tiny"):
        raise ValueError(f"variant must be 'full', 'quick' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/questions"
    # Compute every cell again.
    config.fresh = False
    # A GGUF file or a Hugging Face folder; None is SmolLM2-135M-Instruct, of `make models`.
    config.model = config_dict.placeholder(str)
    # Of weights and activations: float32 or bfloat16.
    config.dtype = "float32"
    # Names in experiments.questions.entrants; None is all of them.
    config.methods = config_dict.placeholder(tuple)
    config.ratios = (2, 4, 8, 16)
    config.seed = 0

    # Texts: so many passages of each kind, of so many tokens, and the tokens behind them. Settings
    # were chosen on the split "tuning".
    config.split = "reporting"
    config.kinds = ("prose", "code", "tables")
    config.passages = 4
    config.passage_tokens = 3584
    config.continuation = 256

    # Tasks: so many examples of each, of so many tokens; "off_context" is a likelihood.
    config.tasks = (
        "single_1",
        "single_2",
        "multikey_1",
        "multivalue",
        "multiquery",
        "off_context",
    )
    config.examples = 20
    config.task_tokens = 1024
    config.task_ratios = (4, 8, 16)
    # Methods of the tasks; None is all of them.
    config.task_methods = (
        "uniform_ends",
        "streaming_llm",
        "fitted",
        "snapkv",
        "attended",
        "kvzip",
        "attended_again",
    )
    # Whether the question is known before compression.
    config.question_first = False
    # Whether further questions about the same document follow, turn by turn.
    config.follow_ups = False

    if variant == "quick":
        config.output = "outputs/questions_quick"
        config.methods = ("uniform_ends", "snapkv", "attended", "kvzip", "attended_again")
        config.task_methods = config.methods
        config.ratios = (8,)
        config.task_ratios = (8,)
        config.passages = 1
        config.tasks = ("single_1", "off_context")
        config.examples = 4
    if variant == "tiny":
        config.output = "outputs/questions_tiny"
        config.methods = ("uniform_ends", "attended", "kvzip")
        config.task_methods = config.methods
        config.ratios = (4,)
        config.task_ratios = (4,)
        config.kinds = ("code",)
        config.passages = 1
        config.passage_tokens = 256
        config.continuation = 32
        config.tasks = ("single_1", "off_context")
        config.examples = 1
        config.task_tokens = 512
    return config
