"""Training of the shipped language model; `:tiny` is the same code path in seconds."""

from __future__ import annotations

import ml_collections


def get_config(variant: str = "shipped") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"shipped"`, the run behind the shipped checkpoint, or `"tiny"`, for tests.

    Returns:
      The configuration that `experiments.train_lm` reads.

    Raises:
      ValueError: `variant` is neither of the two.
    """
    if variant not in ("shipped", "tiny"):
        raise ValueError(f"variant must be 'shipped' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.seed = 0
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
    # How much of the held-out stream the last evaluation reads: all of it.
    config.heldout_bytes = 1 << 30
    config.checkpoint_every = 100
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
        config.checkpoint_every = 6
    return config
