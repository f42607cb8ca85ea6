"""Figures of notebook 05."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from helpers.publishing.plots.style import BLUE, SIGNAL_STYLES, VERMILION, errors, frame, legend_beside, panels


def signal_distributions(values: dict[str, np.ndarray], thresholds: dict[str, float], label: str, title: str,
                         subtitle: str) -> Figure:  # fmt: skip
    """Histograms of a signal (share of the tokens of each text), with thresholds as named vertical lines."""
    figure, axes = frame(title, subtitle)
    bins = np.linspace(0, max(array.max() for array in values.values()), 41)
    fills = (to_rgba(BLUE, 0.35), "none")
    for (name, array), colour, fill in zip(values.items(), (BLUE, VERMILION), fills, strict=False):
        weights = np.full(len(array), 100 / len(array))
        axes.hist(array, bins, weights=weights, histtype="stepfilled", facecolor=fill, edgecolor=colour,
                  linewidth=1.3, label=name)  # fmt: skip
    for (name, threshold), style in zip(thresholds.items(), ("-", "--", ":"), strict=False):
        axes.axvline(threshold, color="black", linestyle=style, linewidth=1.2, label=f"{name}: {threshold:.2f}")
    axes.set_xlabel(label)
    axes.set_ylabel("share of tokens (%)")
    legend_beside(axes)
    return figure


def gate_trace(table: pd.DataFrame, threshold: float, title: str, subtitle: str) -> Figure:
    """`signal` over the steps of one gated text (see `gate.trace`), the steps where the gate fired marked."""
    figure, axes = frame(title, subtitle, (8.2, 3.2))
    axes.plot(table["step"], table["signal"], color=BLUE, linewidth=1.2)
    for fired, author, marker, size, colour in ((False, "small", "o", 14, BLUE), (True, "large", "D", 34, VERMILION)):
        part = table[table["fired"] == fired]
        label = f"{author} model writes ({len(part)})"
        axes.scatter(part["step"], part["signal"], s=size, color=colour, marker=marker, zorder=3, label=label)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold, {threshold:.2f}")
    axes.set_xlabel("token written")
    axes.set_ylabel("entropy of the small model (bits)")
    legend_beside(axes)
    return figure


def against_usage(table: pd.DataFrame, y: str, ends: tuple[float, float], label: str, title: str,
                  subtitle: str) -> Figure:  # fmt: skip
    """`y` with interval (`_low`, `_high`) against measured `usage`, one line a `signal`.

    `ends` are the values of the small model alone and of the large one; lines are drawn from the one to the other.
    """
    figure, axes = frame(title, subtitle, (6.8, 4.2))
    _signals(axes, table, y, label, ends)
    axes.plot([0, 100], ends, "k|", markersize=9)
    legend_beside(axes, title="signal", title_fontsize=8)
    return figure


def speedup_against_usage(table: pd.DataFrame, others: dict[str, float], title: str, subtitle: str) -> Figure:
    """`speedup` over the large model with interval against `usage`, the ideal 1 / (c + p), and `others` as lines."""
    figure, axes = frame(title, subtitle, (6.8, 4.2))
    _speedups(axes, table)
    for (name, value), style in zip(others.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.5", linestyle=style, linewidth=1.1, label=f"{name}: {value:.2f}")
    legend_beside(axes)
    return figure


def gate_choice(table: pd.DataFrame, chosen: pd.Series, title: str, subtitle: str) -> Figure:
    """Fidelity and speed-up against usage of one signal's sweep, the row `chosen` ringed in both panels."""
    figure, (left, right) = panels(title, subtitle, (8.6, 3.6), 2)
    _signals(left, table, "fidelity", "fidelity: ROUGE-L to the large model")
    _speedups(right, table)
    for axes, y in ((left, "fidelity"), (right, "speedup")):
        axes.plot(100 * chosen["usage"], chosen[y], "o", markersize=15, markerfacecolor="none", color=VERMILION)
        axes.set_xlim(0, 100)
    return figure


def _signals(axes: plt.Axes, table: pd.DataFrame, y: str, label: str, ends: tuple[float, float] | None = None) -> None:
    """Points with intervals and a line for each signal; with `ends`, from the small model alone to the large one."""
    for signal, part in table.sort_values("usage").groupby("signal", sort=False):
        colour, marker, dash = SIGNAL_STYLES[signal]
        usage, values = 100 * part["usage"], part[y]
        axes.errorbar(usage, values, errors(part, y), fmt=marker, color=colour, markersize=6, linewidth=1, capsize=2,
                      label=signal)  # fmt: skip
        if ends is not None:
            usage, values = [0, *usage, 100], [ends[0], *values, ends[1]]
        axes.plot(usage, values, dash, color=colour, linewidth=1.1)
    axes.set_xlabel("tokens that the large model wrote (%)")
    axes.set_ylabel(label)


def _speedups(axes: plt.Axes, table: pd.DataFrame) -> None:
    """Speed-ups of each signal below the curve of the ideal."""
    cost_ratio = float(table["cost_ratio"].mean())
    usage = np.linspace(0, 1, 101)
    label = f"ideal 1 / (c + p), c = {cost_ratio:.2f}"
    axes.plot(100 * usage, 1 / (cost_ratio + usage), color="black", linewidth=1.2, label=label)
    _signals(axes, table, "speedup", "speed-up over the large model (per token)")
    axes.set_ylim(bottom=0)
