"""Grids of `experiments.theory.laws`: the default and, for tests, `:tiny`."""

import ml_collections


def get_config(variant: str = "default") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"default"` or `"tiny"`.

    Returns:
      The configuration that `experiments.theory.laws` reads.

    Raises:
      ValueError: `variant` is neither.
    """
    if variant not in ("default", "tiny"):
        raise ValueError(f"variant must be 'default' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.output = "outputs/laws"
    # Compute every cell again, as after a change to the library that kept its version.
    config.fresh = False
    config.seeds = (0, 1, 2, 3, 4)
    config.starts = 32
    config.steps = 40

    # The point that all laws go through: unit-norm keys and values of equal width.
    config.count = 16384
    config.width = 32
    config.rho = 1.0
    config.size = 1024

    # What each law varies.
    config.sizes = (256, 512, 1024, 2048, 4096)
    config.widths = (4, 8, 16, 32, 64)
    # The law of the width is one of more pairs than the first Taylor degree has entries, d².
    config.width_size = 4096
    config.rhos = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
    config.counts = (4096, 8192, 16384, 32768, 65536)
    # One block, halved once by a walk alone.
    config.blocks = (128, 256, 512, 1024, 2048)

    if variant == "tiny":
        config.output = "outputs/laws_tiny"
        config.seeds = (0, 1)
        config.starts = 4
        config.steps = 5
        config.count = 256
        config.width = 4
        config.size = 32
        config.sizes = (16, 64)
        config.widths = (4, 8)
        config.width_size = 64
        config.rhos = (1.0, 2.0)
        config.counts = (128, 256)
        config.blocks = (32, 64)
    return config
