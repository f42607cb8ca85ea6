"""Widths that are worth their bits: the Lagrange multiplier of an average width."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from helpers.cache.quantization import WIDTHS
from helpers.policies.learned import widths_at_multiplier
from helpers.policies.network import Network


def optimal_bits(
    costs: np.ndarray, average: float, widths: Sequence[int] = WIDTHS, tolerance: float = 1e-3
) -> tuple[np.ndarray, float]:
    """Widths `[T]` that minimise `cost + lambda * bits` for each token, and the lambda that gives the `average`.

    `costs` `[T, widths]` in nats. The average is met as closely as one lambda for all tokens allows. Raises
    `ValueError` where `average` is outside the widths, or `costs` are not finite.
    """
    costs = np.asarray(costs, dtype=np.float64)
    bits = np.asarray(widths)
    if costs.ndim != 2 or costs.shape[1] != len(bits) or not len(costs):
        raise ValueError(f"costs must have shape [tokens, {len(bits)}], got {list(costs.shape)}")
    if not np.isfinite(costs).all():
        raise ValueError("costs hold NaN or infinity")
    if not bits.min() <= average <= bits.max():
        raise ValueError(f"average must lie between {bits.min()} and {bits.max()} bits, got {average}")
    low, high = 0.0, float(np.ptp(costs) / np.diff(np.sort(bits)).min()) + 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        chosen = bits[(costs + middle * bits).argmin(1)]
        if abs(chosen.mean() - average) <= tolerance or high - low < 1e-15:
            break
        low, high = (middle, high) if chosen.mean() > average else (low, middle)
    return chosen, middle


RATES = tuple(np.arange(2.0, 16.01, 0.25))


def price_for_average(log_probabilities: torch.Tensor, average: float) -> float:
    """The price per bit (may be negative: a bonus) at which the widths have this average on these rows."""
    low, high = -20.0, 20.0
    for _ in range(60):
        price = (low + high) / 2
        if widths_at_multiplier(log_probabilities, price).double().mean() > average:
            low = price
        else:
            high = price
    return price


def rate_table(network: Network, table: pd.DataFrame) -> dict[float, float]:
    """For a range of average widths that the network can reach on the rows of `table`: average -> price."""
    inputs = torch.tensor(table[list(network.features)].to_numpy(np.float32))
    log_p = network(inputs).log_softmax(-1)
    rates = {}
    for average in RATES:
        price = price_for_average(log_p, average)
        reached = widths_at_multiplier(log_p, price).double().mean().item()
        if abs(reached - average) < 0.1:
            rates[float(average)] = round(price, 6)
    return rates


def rate_distortion(
    costs: np.ndarray, probabilities: np.ndarray | None = None, averages: Sequence[float] = (2.5, 3, 3.5, 4, 5, 6, 8)
) -> pd.DataFrame:
    """Mean cost (nats a token) of the chosen widths at several averages: columns `bits`, `cost`, `blind`.

    `costs` `[T, 4]`. Widths are those of the `probabilities` `[T, 4]` at a price, or without these the optimal ones.
    `blind` is the cost of the same widths dealt out at random, exactly.
    """
    rows = []
    for average in averages:
        if probabilities is None:
            widths, _ = optimal_bits(costs, average)
        else:
            log_p = torch.tensor(probabilities).clamp(min=1e-12).log()
            widths = widths_at_multiplier(log_p, price_for_average(log_p, average)).numpy()
        at = np.searchsorted(WIDTHS, widths)
        blind = np.bincount(at, minlength=len(WIDTHS)) / len(at) @ costs.mean(0)
        rows.append({"bits": widths.mean(), "cost": costs[np.arange(len(at)), at].mean(), "blind": blind})
    return pd.DataFrame(rows)
