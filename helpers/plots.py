"""Every figure, drawn from plain tables. One colour per width throughout, from a colour-blind safe sequence."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from helpers.files import atomic_path
from helpers.packed_store import CENTRE_TOKENS
from helpers.quantization import WIDTHS

WIDTH_COLOURS = dict(zip(WIDTHS, ("#440154", "#31688e", "#35b779", "#fde725"), strict=True))
WIDTH_INK = dict(zip(WIDTHS, ("white", "white", "black", "black"), strict=True))
SIZE = (6.4, 3.6)


def save_figure(figure: Figure, folder: str | Path, name: str) -> Path:
    """Save as `folder/name.png`, white faced; `name` follows `NN_what`."""
    figure.set_facecolor("white")
    path = Path(folder) / f"{name}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    return path


def _frame(title: str, subtitle: str, size: tuple[float, float] = SIZE) -> tuple[Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=20)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color="0.35", va="bottom")
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def entropy_against_rarity(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Scatter of rarity over entropy, one point a token, coloured by the width that the policy chose."""
    figure, axes = _frame(title, subtitle)
    for bits in WIDTHS:
        part = table[table["kv_bits"] == bits]
        label = f"{bits} bits ({len(part)})"
        axes.scatter(part["entropy"], part["rarity"], s=10, color=WIDTH_COLOURS[bits], linewidth=0,
                     label=label)  # fmt: skip
    axes.set_xlabel("entropy of the next-token distribution (nats)")
    axes.set_ylabel("rarity, -ln of token share (nats)")
    axes.legend(title="stored at (tokens)", fontsize=8, title_fontsize=8, frameon=False, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return figure


def correlation_heat_map(table: pd.DataFrame, columns: Sequence[str], title: str, subtitle: str) -> Figure:
    """Pearson correlations of `columns`, numbers in the cells."""
    figure, axes = _frame(title, subtitle, (6.0, 4.6))
    sns.heatmap(table[list(columns)].corr(), annot=True, fmt=".2f", cmap="RdBu_r", vmin=-1, vmax=1, square=True,
                ax=axes, annot_kws={"fontsize": 9},
                cbar_kws={"label": "Pearson correlation", "shrink": 0.85, "pad": 0.03})  # fmt: skip
    axes.tick_params(axis="x", rotation=30)
    axes.tick_params(axis="y", rotation=0)
    return figure


def latency_distribution(table: pd.DataFrame, block: int, title: str, subtitle: str) -> Figure:
    """Time per token of steps that commit a block and of those that do not: violins cut at the data, and the points."""
    figure, axes = _frame(title, subtitle)
    read = table["position"] + 1
    commits = (read % block == 0) & (read >= CENTRE_TOKENS)
    shown = table.assign(step=np.where(commits, "commits a block", "does not commit"))
    order = ["does not commit", "commits a block"]
    limit = table["latency"].quantile(0.995) * 1.1
    sns.violinplot(
        shown, x="latency", y="step", order=order, cut=0, inner=None, width=0.6, color="#cfe1ee", linewidth=0.8, ax=axes
    )
    sns.stripplot(shown, x="latency", y="step", order=order, size=2, color="#31688e", alpha=0.5, ax=axes)
    for place, step in enumerate(order):
        median = shown.loc[shown["step"] == step, "latency"].median()
        axes.plot([median, median], [place - 0.3, place + 0.3], color="black", linewidth=1.5)
        axes.annotate(f"median {median:.2f} ms", (limit, place - 0.2), fontsize=8, ha="right")
    outside = int((table["latency"] > limit).sum())
    axes.set_xlim(0, limit)
    axes.set_xlabel("time per token (ms)" + (f"; {outside} slower token(s) not shown" if outside else ""))
    axes.set_ylabel("")
    return figure


def tokens_by_width(
    tokens: Sequence[str], widths: Sequence[int], title: str, subtitle: str, size_inches: float = 8.0
) -> Figure:
    """A text as boxes, one a token, coloured by its width, with the number of bits under it."""
    figure = plt.figure(figsize=(size_inches, 2.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    renderer = figure.canvas.get_renderer()
    dots = figure.dpi * size_inches
    x, row, places = 0.01, 0, []
    for token, bits in zip(tokens, widths, strict=True):
        shown = token.replace("\n", "↵").strip() or "·"
        text = axes.text(0, 0, shown, fontsize=9.5)
        width = text.get_window_extent(renderer).width / dots + 0.016
        text.remove()
        if x + width > 0.99:
            x, row = 0.01, row + 1
        places.append((x, row, shown, int(bits)))
        x += width + 0.003
    rows = row + 1
    height = 0.75 + 0.42 * rows
    figure.set_size_inches(size_inches, height)
    for x, row, shown, bits in places:
        y = 1 - (0.85 + 0.42 * row) / height
        axes.text(x + 0.008, y, shown, fontsize=9.5, color=WIDTH_INK[bits], va="baseline",
                  bbox={"facecolor": WIDTH_COLOURS[bits], "edgecolor": "none", "pad": 2.2})  # fmt: skip
        axes.text(x + 0.008, y - 0.145 / height, str(bits), fontsize=6.5, color="0.25", va="baseline")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.text(0.01, 1 - 0.2 / height, title, fontsize=11, fontweight="bold", va="center")
    axes.text(0.01, 1 - 0.42 / height, subtitle, fontsize=8.5, color="0.35", va="center")
    return figure


def training_curves(logs: dict[str, pd.DataFrame], title: str, subtitle: str) -> Figure:
    """Training loss (`loss` in nats per token over `tokens` seen) of each model."""
    figure, axes = _frame(title, subtitle)
    for (name, log), colour, dash in zip(logs.items(), ("#31688e", "#d55e00"), ("-", "--"), strict=False):
        axes.plot(log["tokens"] / 1e6, log["loss"], dash, color=colour, label=name)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 4.0))
    axes.legend(frameon=False)
    return figure
