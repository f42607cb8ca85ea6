"""Figures of notebook 05."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.publishing.plots.style import BLUE, SIGNAL_STYLES, VERMILION, frame, heading


def signal_distributions(
    values: dict[str, np.ndarray], thresholds: dict[str, float], label: str, title: str, subtitle: str
) -> Figure:
    """Histograms of a signal (share of the tokens of each text), with thresholds as named vertical lines."""
    figure, axes = frame(title, subtitle)
    bins = np.linspace(0, max(array.max() for array in values.values()), 41)
    for (name, array), colour, fill in zip(values.items(), (BLUE, VERMILION), (0.35, 0.0), strict=False):
        weights = np.full(len(array), 100 / len(array))
        axes.hist(array, bins, weights=weights, histtype="stepfilled" if fill else "step", alpha=None,
                  color=(*plt.matplotlib.colors.to_rgb(colour), fill) if fill else colour, edgecolor=colour,
                  linewidth=1.3, label=name)  # fmt: skip
    for (name, threshold), style in zip(thresholds.items(), ("-", "--", ":"), strict=False):
        axes.axvline(threshold, color="black", linestyle=style, linewidth=1.2, label=f"{name}: {threshold:.2f}")
    axes.set_xlabel(label)
    axes.set_ylabel("share of tokens (%)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def gate_trace(table: pd.DataFrame, threshold: float, title: str, subtitle: str) -> Figure:
    """`signal` over the steps of one gated text (see `gate.trace`), the steps where the gate fired marked."""
    figure, axes = frame(title, subtitle, (8.2, 3.2))
    axes.plot(table["step"], table["signal"], color=BLUE, linewidth=1.2)
    for fired, marker, size in ((False, "o", 14), (True, "D", 34)):
        part = table[table["fired"] == fired]
        colour = VERMILION if fired else BLUE
        label = f"{'large' if fired else 'small'} model writes ({len(part)})"
        axes.scatter(part["step"], part["signal"], s=size, color=colour, marker=marker, zorder=3, label=label)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold, {threshold:.2f}")
    axes.set_xlabel("token written")
    axes.set_ylabel("entropy of the small model (bits)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def against_usage(
    table: pd.DataFrame, y: str, ends: tuple[float, float] | None, label: str, title: str, subtitle: str,
    axes: plt.Axes | None = None,
) -> Figure:  # fmt: skip
    """`y` with interval (`_low`, `_high`) against measured `usage`, one line a `signal`.

    `ends` are the values of the small model alone and of the large one; lines are drawn from the one to the other.
    """
    figure, axes = frame(title, subtitle, (6.8, 4.2)) if axes is None else (axes.figure, axes)
    for signal, part in table.groupby("signal", sort=False):
        colour, marker, dash = SIGNAL_STYLES[signal]
        part = part.sort_values("usage")
        errors = np.stack([part[y] - part[f"{y}_low"], part[f"{y}_high"] - part[y]]).clip(min=0)
        axes.errorbar(100 * part["usage"], part[y], errors, fmt=marker, color=colour, markersize=6, linewidth=1,
                      capsize=2, label=signal)  # fmt: skip
        points = part[["usage", y]].to_numpy()
        if ends is not None:
            points = np.array([(0, ends[0]), *points, (1, ends[1])])
        axes.plot(100 * points[:, 0], points[:, 1], dash, color=colour, linewidth=1.1)
    if ends is not None:
        axes.plot([0, 100], ends, "k|", markersize=9)
    axes.set_xlabel("tokens that the large model wrote (%)")
    axes.set_ylabel(label)
    axes.legend(title="signal", title_fontsize=8, frameon=False, fontsize=8, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return figure


def speedup_against_usage(
    table: pd.DataFrame, others: dict[str, float], title: str, subtitle: str, axes: plt.Axes | None = None
) -> Figure:
    """`speedup` over the large model with interval against `usage`, the ideal 1 / (c + p), and `others` as lines."""
    figure, axes = frame(title, subtitle, (6.8, 4.2)) if axes is None else (axes.figure, axes)
    cost_ratio = float(table["cost_ratio"].mean())
    usage = np.linspace(0, 1, 101)
    axes.plot(100 * usage, 1 / (cost_ratio + usage), color="black", linewidth=1.2,
              label=f"ideal 1 / (c + p), c = {cost_ratio:.2f}")  # fmt: skip
    for signal, part in table.groupby("signal", sort=False):
        colour, marker, dash = SIGNAL_STYLES[signal]
        part = part.sort_values("usage")
        errors = np.stack([part["speedup"] - part["speedup_low"], part["speedup_high"] - part["speedup"]]).clip(min=0)
        axes.errorbar(100 * part["usage"], part["speedup"], errors, fmt=f"{marker}{dash}", color=colour, markersize=6,
                      linewidth=1.1, capsize=2, label=signal)  # fmt: skip
    for (name, value), style in zip(others.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.5", linestyle=style, linewidth=1.1, label=f"{name}: {value:.2f}")
    axes.set_xlabel("tokens that the large model wrote (%)")
    axes.set_ylabel("speed-up over the large model (per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def gate_choice(table: pd.DataFrame, chosen: pd.Series, title: str, subtitle: str) -> Figure:
    """Fidelity and speed-up against usage of one signal's sweep, the row `chosen` ringed in both panels."""
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.6))
    heading(figure, title, subtitle)
    against_usage(table, "fidelity", None, "fidelity: ROUGE-L to the large model", "", "", panels[0])
    speedup_against_usage(table, {}, "", "", panels[1])
    for axes, y in zip(panels, ("fidelity", "speedup"), strict=True):
        axes.plot(100 * chosen["usage"], chosen[y], "o", markersize=15, markerfacecolor="none", color=VERMILION)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 100)
        axes.get_legend().remove()
    return figure
