"""Means, medians and ratios with bootstrap intervals over texts."""

from collections.abc import Callable

import numpy as np


def bootstrap_mean(
    values: np.ndarray, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of per-text `values` with a percentile bootstrap interval over texts: (mean, low, high).

    Pass per-text differences for a paired comparison.
    """
    return _bootstrap(values, np.mean, resamples, level, seed)


def bootstrap_median(
    values: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Median of `values` with a percentile bootstrap interval: (median, low, high)."""
    return _bootstrap(values, np.median, resamples, level, seed)


def _bootstrap(values: np.ndarray, statistic, resamples: int, level: float, seed: int) -> tuple[float, float, float]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty list with one number a text, got shape {values.shape}")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(statistic(values[draws], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(values)), float(low), float(high)


def bootstrap_groups(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
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


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the means of two per-text measures with a paired bootstrap interval over texts: (ratio, low, high)."""
    pairs = np.stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)])
    if pairs.ndim != 2 or not pairs.shape[1]:
        raise ValueError(f"numerator and denominator must hold one number a text each, got shape {pairs.shape[1:]}")
    draws = np.random.default_rng(seed).integers(pairs.shape[1], size=(resamples, pairs.shape[1]))
    above, below = pairs[:, draws].mean(axis=-1)
    low, high = np.quantile(above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(pairs[0].mean() / pairs[1].mean()), float(low), float(high)
