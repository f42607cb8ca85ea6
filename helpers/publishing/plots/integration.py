"""Figures of notebook 03."""

import pandas as pd
from matplotlib.figure import Figure

from helpers.publishing.plots.style import GROUP_STYLES, frame, legend_beside, method_bars


def bytes_over_text(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Held and live bytes (`held_bytes`, `live_bytes`) of each `method` (with its `group`) against `tokens` read."""
    figure, axes = frame(title, subtitle, (8.2, 3.6))
    for number, (name, part) in enumerate(table.groupby("method", sort=False)):
        colour, _ = GROUP_STYLES[part["group"].iloc[0]]
        look = {"color": colour, "marker": "osD^v*"[number % 6], "markersize": 4, "markevery": (2 + number, 6)}
        axes.plot(part["tokens"], part["held_bytes"] / 1024, linewidth=1.4, label=name, **look)
        axes.plot(part["tokens"], part["live_bytes"] / 1024, ":", linewidth=1.2, **look)
    axes.plot([], [], ":", color="0.3", label="dotted: live, without spare capacity")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("held by the cache (KiB)")
    legend_beside(axes, fontsize=7.5)
    return figure


def kl_bars(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Bars of `kl` with interval for each `method`, coloured by `group`, on a logarithmic axis."""
    label = "KL to full precision (nats per token)"
    figure = method_bars(table, "kl", "kl_low", "kl_high", label, title, subtitle)
    if len(table):
        figure.axes[0].set_xscale("log")
    return figure
