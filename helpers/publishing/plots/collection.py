"""Figures of notebook 01."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.cache import WIDTHS
from helpers.cache.centre import CENTRE_TOKENS
from helpers.publishing.plots.style import BLUE, WIDTH_COLOURS, frame, legend_beside


def entropy_against_rarity(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Scatter of rarity over entropy, one point a token, coloured by the width that the policy chose."""
    figure, axes = frame(title, subtitle)
    for bits in WIDTHS:
        part = table[table["kv_bits"] == bits]
        look = {"s": 10, "linewidth": 0, "color": WIDTH_COLOURS[bits], "label": f"{bits} bits ({len(part)})"}
        axes.scatter(part["entropy"], part["rarity"], **look)
    axes.set_xlabel("entropy of the next-token distribution (nats)")
    axes.set_ylabel("rarity, -ln of token share (nats)")
    legend_beside(axes, title="stored at (tokens)", title_fontsize=8)
    return figure


def correlation_heat_map(table: pd.DataFrame, columns: Sequence[str], title: str, subtitle: str) -> Figure:
    """Pearson correlations of `columns`, numbers in the cells."""
    figure, axes = frame(title, subtitle, (6.0, 4.6))
    bar = {"label": "Pearson correlation", "shrink": 0.85, "pad": 0.03}
    look = {"annot": True, "fmt": ".2f", "annot_kws": {"fontsize": 9}, "cmap": "RdBu_r", "cbar_kws": bar}
    sns.heatmap(table[list(columns)].corr(), vmin=-1, vmax=1, square=True, ax=axes, **look)
    axes.tick_params(axis="x", rotation=30)
    axes.tick_params(axis="y", rotation=0)
    return figure


def latency_distribution(table: pd.DataFrame, block: int, title: str, subtitle: str) -> Figure:
    """Time per token of steps that commit a block and of those that do not: violins cut at the data, and the points."""
    figure, axes = frame(title, subtitle)
    read = table["position"] + 1
    commits = (read % block == 0) & (read >= CENTRE_TOKENS)
    shown = table.assign(step=np.where(commits, "commits a block", "does not commit"))
    order = ["does not commit", "commits a block"]
    limit = table["latency"].quantile(0.995) * 1.1
    look = {"cut": 0, "inner": None, "width": 0.6, "color": "#cfe1ee", "linewidth": 0.8}
    sns.violinplot(shown, x="latency", y="step", order=order, ax=axes, **look)
    jitter = np.random.default_rng(0)  # seaborn's own would differ from run to run
    for place, step in enumerate(order):
        part = shown.loc[shown["step"] == step, "latency"]
        axes.scatter(part, place + jitter.uniform(-0.1, 0.1, len(part)), s=4, color=BLUE, alpha=0.5, linewidth=0)
        median = part.median()
        axes.plot([median, median], [place - 0.3, place + 0.3], color="black", linewidth=1.5)
        axes.annotate(f"median {median:.2f} ms", (limit, place - 0.2), fontsize=8, ha="right")
    outside = int((table["latency"] > limit).sum())
    axes.set_xlim(0, limit)
    axes.set_xlabel("time per token (ms)" + (f"; {outside} slower token(s) not shown" if outside else ""))
    axes.set_ylabel("")
    return figure
