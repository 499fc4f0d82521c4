"""Grids of `experiments.theory.sweep`: `:full`, the default, `:quick` and, for tests, `:tiny`."""

import ml_collections


def get_config(variant: str = "full") -> ml_collections.ConfigDict:
    """Return the configuration.

    Args:
      variant: `"full"`, `"quick"`, the corner of `full` that its figures of merit are read from,
        or `"tiny"`.

    Returns:
      The configuration that `experiments.theory.sweep` reads.

    Raises:
      ValueError: `variant` is none of the three.
    """
    if variant not in ("full", "quick", "tiny"):
        raise ValueError(f"variant must be 'full', 'quick' or 'tiny', got {variant!r}")
    config = ml_collections.ConfigDict()
    config.name = variant
    # The variants share one file of finished cells: what `quick` computed, `full` takes over.
    config.output = "outputs/sweep"
    # Compute every cell again, as after a change to the library that kept its version.
    config.fresh = False

    config.instance = "unit_sphere"
    config.count = 16384
    config.rhos = (1.0, 2.0, 3.0, 4.0)
    # Keys and values are equally wide.
    config.widths = (16, 32, 64)
    config.sizes = (256, 512, 1024, 2048, 4096)
    config.seeds = (0, 1, 2)
    config.methods = ("balanced", "uniform", "balance_kv", "balance_kv_corrected")

    config.starts = 64
    config.steps = 40

    # Slopes are fitted to the sizes from the first to the second of these.
    config.slope_sizes = (256, 4096)
    # The table says at which size each method reaches these errors.
    config.errors = (0.02, 0.01, 0.005)

    # What `balanced` is held to, where the grid has the cell: largest median error by
    # (rho, width, size), and largest slope by (rho, width).
    config.error_bounds = (
        (1.0, 32, 256, 0.022),
        (1.0, 32, 1024, 0.0070),
        (1.0, 32, 4096, 0.0022),
        (2.0, 32, 256, 0.042),
        (2.0, 32, 1024, 0.015),
        (2.0, 32, 4096, 0.0048),
    )
    config.slope_bounds = ((1.0, 32, -0.85),)

    if variant == "quick":
        config.rhos = (1.0, 2.0)
        config.widths = (32,)
        config.sizes = (256, 1024, 4096)
    if variant == "tiny":
        config.output = "outputs/sweep_tiny"
        config.count = 256
        config.rhos = (1.0, 2.0)
        config.widths = (4,)
        config.sizes = (16, 64)
        config.seeds = (0, 1)
        config.methods = ("balanced", "uniform")
        config.starts = 8
        config.steps = 10
        config.slope_sizes = (16, 64)
        config.errors = (0.2, 0.001)
        config.error_bounds = ((1.0, 4, 64, 0.5), (2.0, 4, 64, 1e-6))
        config.slope_bounds = ((1.0, 4, 0.0),)
    return config
