"""Colours, markers and frames that all figures share; bars and legends that several draw alike."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.cache import WIDTHS
from helpers.io import atomic_path

WIDTH_COLOURS = dict(zip(WIDTHS, ("#440154", "#31688e", "#35b779", "#fde725"), strict=True))
WIDTH_INK = dict(zip(WIDTHS, ("white", "white", "black", "black"), strict=True))
SIZE = (6.4, 3.6)
BLUE, VERMILION = "#31688e", "#d55e00"
DASHES = ("-", "--", "-.", ":", (0, (1, 4)))

# One colour and marker per kind of method, in every figure (Okabe and Ito's colours).
GROUP_STYLES = {
    "full precision": ("black", "*"),
    "static": ("#0072b2", "o"),
    "rule": ("#e69f00", "s"),
    "schedule": ("#009e73", "^"),
    "learned at commit": ("#cc79a7", "D"),
    "learned at settle": ("#d55e00", "P"),
    "stock": ("0.45", "X"),
}
# The imitation controller copies the rule and has its colour; a control by chance is grey.
CONTROLLER_COLOURS = {
    "imitation": GROUP_STYLES["rule"][0],
    "commit": GROUP_STYLES["learned at commit"][0],
    "settle": GROUP_STYLES["learned at settle"][0],
    "same widths at random": "0.45",
}
# One look per signal of the gate, and per author of a token.
SIGNAL_STYLES = {
    "entropy": ("#0072b2", "o", "-"),
    "max_prob": ("#e69f00", "s", "--"),
    "margin": ("#009e73", "^", "-."),
    "learned": ("#cc79a7", "P", "-"),
    "random": ("0.45", "X", ":"),
    "oracle": ("black", "*", "-"),
}
AUTHOR_LOOKS = {"small": ("#cfe1ee", "black"), "large": (VERMILION, "white")}


def save_figure(figure: Figure, folder: str | Path, name: str) -> Path:
    """Save as `folder/name.png`, white faced; `name` follows `NN_what`."""
    figure.set_facecolor("white")
    path = Path(folder) / f"{name}.png"
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches="tight", facecolor="white", metadata={"Software": None})
    return path


def _wrapped(text: str, inches: float, size: float) -> str:
    """`text` in lines of at most `inches`, for letters of `size` points (about half as wide as high)."""
    return "\n".join(textwrap.wrap(text, max(20, int(inches * 72 / (0.53 * size)))))


def _heading(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the left edge, wrapped to the figure's width; the figure grows by what they take."""
    width, height = figure.get_size_inches()
    title, subtitle = _wrapped(title, width - 0.3, 11), _wrapped(subtitle, width - 0.3, 8.5)
    below_title = 0.08 + 0.2 * (1 + title.count("\n"))
    heading = below_title + 0.15 * (1 + subtitle.count("\n")) + 0.1
    height += heading - 0.35
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - heading / height))
    look = {"va": "top", "linespacing": 1.15}
    figure.text(0.1 / width, 1 - 0.08 / height, title, fontsize=11, fontweight="bold", **look)
    figure.text(0.1 / width, 1 - below_title / height, subtitle, fontsize=8.5, color="0.35", **look)


def panels(title: str, subtitle: str, size: tuple[float, float], count: int) -> tuple[Figure, Sequence[plt.Axes]]:
    """A figure with a heading over `count` panels side by side."""
    figure, axes = plt.subplots(1, count, figsize=size, squeeze=False)
    _heading(figure, title, subtitle)
    for each in axes[0]:
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def frame(title: str, subtitle: str, size: tuple[float, float] = SIZE) -> tuple[Figure, plt.Axes]:
    """A figure with a heading over one panel."""
    figure, axes = panels(title, subtitle, size, 1)
    return figure, axes[0]


def errors(table: pd.DataFrame, value: str, low: str | None = None, high: str | None = None) -> np.ndarray:
    """`[2, rows]`: how far the interval of column `value` reaches below and above it."""
    low, high = low or f"{value}_low", high or f"{value}_high"
    return np.stack([table[value] - table[low], table[high] - table[value]]).clip(min=0)


def legend_beside(axes: plt.Axes, **look) -> None:
    """The legend to the right of a panel."""
    axes.legend(**{"frameon": False, "fontsize": 8, "loc": "center left", "bbox_to_anchor": (1.0, 0.5)} | look)


def bars(names: Sequence[str], values: pd.Series, reach: np.ndarray, colours: Sequence[str], label: str, title: str,
         subtitle: str, size: tuple[float, float]) -> tuple[Figure, plt.Axes]:  # fmt: skip
    """Horizontal bars with intervals, the first on top."""
    figure, axes = frame(title, subtitle, size)
    axes.barh(names, values, xerr=reach, color=colours, height=0.65, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    axes.set_xlabel(label)
    return figure, axes


def method_bars(table: pd.DataFrame, value: str, low: str, high: str, label: str, title: str, subtitle: str) -> Figure:
    """Bars of column `value` with its interval for each `method`, coloured by `group`."""
    colours = [GROUP_STYLES[group][0] for group in table["group"]]
    size = (7.6, 0.27 * len(table) + 1.5)
    reach = errors(table, value, low, high)
    figure, axes = bars(table["method"], table[value], reach, colours, label, title, subtitle, size)
    axes.tick_params(axis="y", labelsize=8)
    return figure
