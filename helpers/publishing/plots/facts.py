"""Figure of notebook 04 on facts in long texts."""

import pandas as pd
from matplotlib.figure import Figure

from helpers.publishing.plots.style import DASHES, GROUP_STYLES, panels

BINS = 4  # of depth


def facts_by_depth(table: pd.DataFrame, styles: dict[str, str], chance: float, title: str, subtitle: str) -> Figure:
    """Share of facts found by how deep they lie, a panel a `length`, a line a method; `styles`: method -> group."""
    lengths = table["length"].unique()
    figure, axes = panels(title, subtitle, (8.6, 3.9), len(lengths))
    depth = (table["depth"] * BINS).astype(int).clip(upper=BINS - 1)
    shares = table.assign(bin=(depth + 0.5) / BINS).groupby(["length", "method", "bin"], sort=False)["found"].mean()
    for panel, length in zip(axes, lengths, strict=True):
        for number, method in enumerate(table["method"].unique()):
            colour, marker = GROUP_STYLES[styles[method]]
            line = shares[length][method].sort_index()
            look = {"color": colour, "marker": marker, "linestyle": DASHES[number % len(DASHES)]}
            panel.plot(line.index, 100 * line, label=method, markersize=5, linewidth=1.3, **look)
        panel.axhline(100 * chance, color="0.7", linewidth=0.9, zorder=0)
        panel.annotate("chance", (0, 100 * chance), fontsize=8, color="0.45", va="bottom")
        panel.set_title(f"{length:,} tokens", fontsize=9)
        panel.set_xlabel("depth (0: beginning, 1: end)")
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 103)
    axes[0].set_ylabel("facts found (%)")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, fontsize=8, loc="outside lower center", ncols=3)
    return figure
