"""Figures of notebook 03."""

import pandas as pd
from matplotlib.figure import Figure

from helpers.publishing.plots.style import GROUP_STYLES, method_bars, panels


def bytes_over_text(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Peak bytes, and held beside live ones, of each `method` (with its `group`) against `tokens` read.

    Columns `peak_bytes` (NaN where it was not measured), `held_bytes`, `live_bytes`.
    """
    figure, (left, right) = panels(title, subtitle, (8.6, 4.4), 2)
    drawn = []
    for number, (name, part) in enumerate(table.groupby("method", sort=False)):
        group = part["group"].iloc[0]
        look = {"color": GROUP_STYLES[group][0], "marker": "osD^v*"[number % 6], "markersize": 4}
        line = {"linewidth": 1.4, "linestyle": "--" if group in drawn else "-"}
        drawn.append(group)
        peaks = part.dropna(subset="peak_bytes")
        left.plot(peaks["tokens"], peaks["peak_bytes"] / 1024, label=name, **look, **line)
        look["markevery"] = (2 + number, 6)
        right.plot(part["tokens"], part["held_bytes"] / 1024, **look, **line)
        right.plot(part["tokens"], part["live_bytes"] / 1024, ":", linewidth=1.2, **look)
    left.plot([], [], ":", color="0.3", label="dotted: live, without spare room")
    for axes, label in ((left, "peak (KiB)"), (right, "held, and live (KiB)")):
        axes.set_xlabel("tokens of the text")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def kl_bars(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Bars of `kl` with interval for each `method`, coloured by `group`, on a logarithmic axis."""
    label = "KL to full precision (nats per token)"
    figure = method_bars(table, "kl", "kl_low", "kl_high", label, title, subtitle)
    if len(table):
        figure.axes[0].set_xscale("log")
    return figure
