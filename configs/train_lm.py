"""Training of the shipped language model, in stages: the default one, `:long`, `:recall`, `:final`.

`:tiny` is the same code path in seconds.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_collections


class _Stage(NamedTuple):
    """A stage that goes on from the model of another; settings as in the configuration."""

    after: str
    phases: tuple[tuple[int, int, int], ...]
    repeats: int
    adam_learning_rate: float
    decay_start: int
    evaluate_every: int


_CONTINUED = {
    "long": _Stage("short", ((110, 1, 8192), (24, 1, 16384)), 4, 0.001, 60, 40),
    "recall": _Stage("long", ((170, 2, 4096),), 8, 0.002, 60, 50),
    "final": _Stage("recall", ((100, 1, 8192),), 8, 0.0015, 30, 50),
}
STAGES = ("short", *_CONTINUED)
VARIANTS = (*STAGES, "tiny")


def get_config(variant: str = "short") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"short"`, the first stage of the shipped checkpoint; `"long"`, `"recall"` and
        `"final"`, the others, each of which starts from the model of the one before
        (`config.start`); or `"tiny"`, for tests.

    Returns:
      The configuration that `experiments.model.train_lm` reads.

    Raises:
      ValueError: `variant` is none of them.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {VARIANTS}, got {variant!r}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    # A model to go on from, as a file; the optimizer begins anew. Empty: random parameters.
    config.start = ""
    config.model = ml_collections.ConfigDict(
        {
            "num_layers": 4,
            "embed_dim": 256,
            "num_query_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 64,
            "mlp_dim": 704,
            "bigram_buckets": 8192,
            "trigram_buckets": 16384,
            "ngram_dim": 64,
            "rope_base": 100_000.0,
        }
    )
    # Factors of the matrix products inside the blocks, while training. bfloat16 pays where the CPU
    # has AVX512-BF16; sums, parameters, optimizer and residual stream are float32 in any case.
    config.matmul_dtype = "bfloat16"
    # (steps, sequences a step, bytes a sequence): short and cheap first, long at the end.
    config.phases = ((800, 24, 256), (450, 6, 1024), (190, 2, 4096))
    # Passages of every window that repeat an earlier one.
    config.repeats = 0
    config.muon_learning_rate = 0.02
    config.adam_learning_rate = 0.004
    config.adam_weight_decay = 0.1
    config.warmup_steps = 100
    # The learning rate falls linearly to zero from this step to the last.
    config.decay_start = 1000
    config.max_gradient_norm = 1.0
    config.log_every = 20
    config.evaluate_every = 250
    config.evaluation_windows = 16
    config.evaluation_width = 2048
    # How much of the held-out stream the last evaluation reads, all of it, and in what windows.
    config.heldout_bytes = 1 << 30
    config.heldout_window = 4096
    config.checkpoint_every = 100
    if variant in _CONTINUED:
        stage = _CONTINUED[variant]
        config.start = f"/tmp/train_{stage.after}/model.safetensors"
        config.phases = stage.phases
        config.repeats = stage.repeats
        config.muon_learning_rate = 0.005
        config.adam_learning_rate = stage.adam_learning_rate
        config.warmup_steps = 10
        config.decay_start = stage.decay_start
        config.log_every = 10
        config.evaluate_every = stage.evaluate_every
        config.checkpoint_every = 10
    if variant == "tiny":
        config.model.num_layers = 2
        config.model.embed_dim = 32
        config.model.num_query_heads = 2
        config.model.num_kv_heads = 1
        config.model.head_dim = 16
        config.model.mlp_dim = 64
        config.model.bigram_buckets = 256
        config.model.trigram_buckets = 512
        config.model.ngram_dim = 8
        config.matmul_dtype = "float32"
        config.phases = ((12, 4, 64), (4, 2, 128))
        config.warmup_steps = 2
        config.decay_start = 8
        config.log_every = 2
        config.evaluate_every = 8
        config.evaluation_windows = 2
        config.evaluation_width = 128
        config.heldout_bytes = 1000
        config.heldout_window = 128
        config.checkpoint_every = 6
    return config
