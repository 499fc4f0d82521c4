"""A cell of the theory's grids: a synthetic cache, its coreset, the worst query, and fits."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats  # type: ignore[import-untyped]  # a dependency of jax itself

import coreset_jax as cj
from experiments.theory import instances

# The methods, given the radius. Their softmax scale is 1 in all of this.
METHODS: dict[str, Callable[[float], cj.Compressor]] = {
    "balanced": lambda rho: cj.balanced(rho=rho, scale=1.0),
    "uniform": lambda rho: cj.baselines.uniform(),
    "balance_kv": lambda rho: cj.baselines.balance_kv(scale=1.0),
    "balance_kv_corrected": lambda rho: cj.baselines.balance_kv(corrected=True, scale=1.0),
}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One point of the grid: everything that its error depends on."""

    instance: str
    count: int
    width: int
    rho: float
    size: int
    method: str
    seed: int
    starts: int
    steps: int

    def settings(self) -> dict[str, Any]:
        """The name of the cell in the store."""
        return {"experiment": "sweep", **dataclasses.asdict(self)}

    def __str__(self) -> str:
        return f"ρ {self.rho:g}, d {self.width}, size {self.size}, {self.method}, seed {self.seed}"


def measure(
    cell: Cell, methods: Mapping[str, Callable[[float], cj.Compressor]] = METHODS
) -> dict[str, float]:
    """Compresses the cell's cache and looks for the worst query.

    Args:
      cell: the settings.
      methods: the compressors by the names of the methods, given the radius.

    Returns:
      ``error``, the largest error found, in units of the values' norm 1, and ``median_ascent``,
      the median over the ascents: near ``error`` where the search has nothing more to find.
    """
    instance_rng, method_rng, adversary_rng = jax.random.split(jax.random.key(cell.seed), 3)
    keys, values = instances.INSTANCES[cell.instance](
        instance_rng, cell.count, cell.width, cell.width
    )
    coreset = methods[cell.method](cell.rho)(method_rng, keys, values, size=cell.size)
    worst = cj.guarantees.adversary(
        adversary_rng,
        keys,
        values,
        coreset,
        rho=cell.rho,
        scale=1.0,
        starts=cell.starts,
        steps=cell.steps,
    )
    return {"error": float(worst.error), "median_ascent": float(np.median(worst.errors))}


class Slope(NamedTuple):
    """The exponent of error against size, and half its 95 % confidence interval."""

    slope: float
    half_width: float


def fit_line(positions: np.ndarray, errors: np.ndarray) -> Slope:
    """Least squares of log error on a position, every seed a point.

    Args:
      positions: where the errors were measured ``[points]``.
      errors: ``[points, seeds]``.

    Returns:
      The slope with half its 95 % interval (Student's t); NaN with fewer than three points.
    """
    places = np.repeat(positions, errors.shape[1])
    errors = errors.ravel()
    usable = np.isfinite(errors) & (errors > 0)
    if np.sum(usable) < 3 or np.unique(places[usable]).size < 2:
        return Slope(math.nan, math.nan)
    fit = scipy.stats.linregress(places[usable], np.log(errors[usable]))
    quantile = scipy.stats.t.ppf(0.975, np.sum(usable) - 2)
    return Slope(float(fit.slope), float(quantile * fit.stderr))
