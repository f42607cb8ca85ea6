"""Widths that are worth their bits: each token takes the width of least `cost + multiplier * bits`.

One Lagrange multiplier for all tokens spends a given average; it is the price of a bit. Costs are measured ones (nats),
or the negative log-probabilities of a network, which then says how sure it is that a token needs its bits.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import torch

from helpers.cache import WIDTHS
from helpers.policies.learned import widths_at_multiplier
from helpers.policies.network import Network

RATES = tuple(np.arange(2.0, 16.01, 0.25))  # averages that a trained controller is asked for


def multiplier_for_average(
    widths_at: Callable[[float], np.ndarray | torch.Tensor], average: float, low: float, high: float, tolerance=0.0
) -> float:
    """The multiplier between `low` and `high` at which `widths_at(multiplier)` have this average, by bisection.

    Stops where the average is met within `tolerance`; with 0 it goes on to the multiplier where the widths change.
    """
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(widths_at(middle).mean())
        if abs(reached - average) < tolerance:
            break
        low, high = (middle, high) if reached > average else (low, middle)
    return middle


def optimal_bits(costs: np.ndarray, average: float) -> tuple[np.ndarray, float]:
    """Widths `[T]` that minimise `cost + multiplier * bits` for each token, and the multiplier for this `average`.

    `costs` `[T, 4]` in nats. The average is met as closely as one multiplier for all tokens allows. Raises
    `ValueError` where `average` is outside the widths, or `costs` are not finite.
    """
    costs, bits = np.asarray(costs, dtype=np.float64), np.asarray(WIDTHS)
    if costs.ndim != 2 or costs.shape[1] != len(bits) or not len(costs):
        raise ValueError(f"costs must have shape [tokens, {len(bits)}], got {list(costs.shape)}")
    if not np.isfinite(costs).all():
        raise ValueError("costs hold NaN or infinity")
    if not bits.min() <= average <= bits.max():
        raise ValueError(f"average must lie between {bits.min()} and {bits.max()} bits, got {average}")

    def widths_at(multiplier: float) -> np.ndarray:
        return bits[(costs + multiplier * bits).argmin(1)]

    high = float(np.ptp(costs) / np.diff(np.sort(bits)).min()) + 1e-12
    multiplier = multiplier_for_average(widths_at, average, 0.0, high, tolerance=1e-3)
    return widths_at(multiplier), multiplier


def network_bits(log_probabilities: torch.Tensor, average: float) -> tuple[torch.Tensor, float]:
    """`optimal_bits` for the log-probabilities `[T, 4]` of a network; the multiplier may be negative: a bonus."""

    def widths_at(multiplier: float) -> torch.Tensor:
        return widths_at_multiplier(log_probabilities, multiplier).double()

    multiplier = multiplier_for_average(widths_at, average, -20.0, 20.0)
    return widths_at(multiplier), multiplier


def rate_table(network: Network, table: pd.DataFrame) -> dict[float, float]:
    """For a range of average widths that the network can reach on the rows of `table`: average -> multiplier."""
    inputs = torch.tensor(table[list(network.features)].to_numpy(np.float32))
    log_p = network(inputs).log_softmax(-1)
    rates = {}
    for average in RATES:
        widths, multiplier = network_bits(log_p, average)
        if abs(widths.mean().item() - average) < 0.1:
            rates[float(average)] = round(multiplier, 6)
    return rates


def rate_distortion(
    costs: np.ndarray, probabilities: np.ndarray | None = None, averages: Sequence[float] = (2.5, 3, 3.5, 4, 5, 6, 8)
) -> pd.DataFrame:
    """Mean cost (nats a token) of the chosen widths at several averages: columns `bits`, `cost`, `random_cost`.

    `costs` `[T, 4]`. Widths are those that the `probabilities` `[T, 4]` of a network lead to, or without these the
    optimal ones. `random_cost` is what the same widths cost when dealt out at random, exactly: the control.
    """
    rows = []
    for average in averages:
        if probabilities is None:
            widths, _ = optimal_bits(costs, average)
        else:
            widths = network_bits(torch.tensor(probabilities).clamp(min=1e-12).log(), average)[0].numpy()
        at = np.searchsorted(WIDTHS, widths)
        at_random = np.bincount(at, minlength=len(WIDTHS)) / len(at) @ costs.mean(0)
        rows.append({"bits": widths.mean(), "cost": costs[np.arange(len(at)), at].mean(), "random_cost": at_random})
    return pd.DataFrame(rows)
