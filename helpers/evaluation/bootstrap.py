"""Means, medians and ratios with bootstrap intervals over texts.

A value stands first in each result, then the ends of its percentile interval. Draws are seeded.
"""

from collections.abc import Callable

import numpy as np

Interval = tuple[float, float, float]  # value, low, high


def bootstrap_mean(values: np.ndarray, resamples: int = 2000, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of per-text `values` with its interval. Pass per-text differences for a paired comparison."""
    return _bootstrap(values, lambda x: x.mean(-1), resamples, level, seed)


def bootstrap_median(values: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0) -> Interval:
    """Median of `values` with its interval."""
    return _bootstrap(values, lambda x: np.median(x, -1), resamples, level, seed)


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Ratio of the means of two per-text measures, texts drawn in pairs."""
    return _bootstrap([numerator, denominator], lambda x: np.divide(*x.mean(-1)), resamples, level, seed, measures=2)


def _bootstrap(values, statistic: Callable, resamples: int, level: float, seed: int, measures: int = 1) -> Interval:
    """`statistic` of `values` `[texts]`, or `[measures, texts]`, with its interval; it works along the last axis."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != measures or not values.size:
        raise ValueError(f"there must be one number a text each, got values of shape {values.shape}")
    draws = np.random.default_rng(seed).integers(values.shape[-1], size=(resamples, values.shape[-1]))
    low, high = np.quantile(statistic(values[..., draws]), [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(values)), float(low), float(high)


def interval_columns(name: str, values: np.ndarray) -> dict[str, float]:
    """Columns `name`, `name`_low and `name`_high of a table: `bootstrap_mean` of per-text `values`."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), bootstrap_mean(values), strict=True))


def bootstrap_groups(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`statistic(rows)` with an interval from resampling whole groups (texts): (value, low, high).

    `statistic` takes an integer array of row numbers; `groups` `[rows]` names each row's text.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    random = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([members[i] for i in random.integers(len(members), size=len(members))]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(np.arange(len(groups)))), float(low), float(high)
