"""Settings of `experiments.theory.lower_bound`: the default and, for tests, `:tiny`."""

import ml_collections


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"default"` or `"tiny"`.

    Returns:
      The configuration that `experiments.theory.lower_bound` reads.

    Raises:
      ValueError: `variant` is neither.
    """
    if variant not in ("default", "tiny"):
        raise ValueError(f"variant must be 'default' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/lower_bound"
    # Compute every cell again, as after a change to the library that kept its version.
    config.fresh = False

    # (theorem, d, rho, eps): 7 hides a bit in every pair, 6 as many as values are wide.
    config.instances = (
        (7, 64, 3.0, 0.025),
        (7, 32, 4.0, 0.02),
        (6, 64, 4.0, 0.1),
        (6, 32, 5.0, 0.05),
    )
    # Sizes, as shares of the pairs; one half must be among them.
    config.shares = (0.0625, 0.125, 0.25, 0.5, 0.75)
    config.seeds = (0, 1, 2)
    config.methods = ("balanced", "uniform", "balance_kv", "balance_kv_corrected")

    # What the figures are held to: the least share of bits read from the full cache, and the
    # largest that a method may read from half of the pairs.
    config.full_success = 0.99
    config.half_success = 0.9

    if variant == "tiny":
        config.output = "outputs/lower_bound_tiny"
        config.instances = ((7, 8, 3.0, 0.1), (6, 16, 3.0, 0.2))
        config.shares = (0.5,)
        config.seeds = (0, 1)
        config.methods = ("balanced", "uniform")
    return config
