"""Figures of notebook 03."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.publishing.plots.style import GROUP_STYLES, frame


def bytes_over_text(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """`live_bytes` and `stored_bytes` of each `method` (with its `group`) against `tokens` read."""
    figure, axes = frame(title, subtitle, (8.2, 3.6))
    for number, (name, part) in enumerate(table.groupby("method", sort=False)):
        colour, _ = GROUP_STYLES[part["group"].iloc[0]]
        look = {"color": colour, "marker": "osD^v*"[number % 6], "markersize": 4, "markevery": (2 + number, 6)}
        axes.plot(part["tokens"], part["stored_bytes"] / 1024, linewidth=1.4, label=name, **look)
        axes.plot(part["tokens"], part["live_bytes"] / 1024, ":", linewidth=1.2, **look)
    axes.plot([], [], ":", color="0.3", label="dotted: without spare capacity")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("cache (KiB)")
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def kl_bars(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Bars of `kl` with interval for each `method`, coloured by `group`, on a logarithmic axis."""
    figure, axes = frame(title, subtitle, (7.6, 0.27 * len(table) + 1.5))
    errors = np.stack([table["kl"] - table["kl_low"], table["kl_high"] - table["kl"]])
    colours = [GROUP_STYLES[group][0] for group in table["group"]]
    axes.barh(table["method"], table["kl"], xerr=errors, color=colours, height=0.65, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    if len(table):
        axes.set_xscale("log")
    axes.set_xlabel("KL to full precision (nats per token)")
    axes.tick_params(axis="y", labelsize=8)
    return figure
