"""Colours, markers and frames that all figures share."""

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from helpers.cache.quantization import WIDTHS
from helpers.io.atomic import atomic_path

WIDTH_COLOURS = dict(zip(WIDTHS, ("#440154", "#31688e", "#35b779", "#fde725"), strict=True))


WIDTH_INK = dict(zip(WIDTHS, ("white", "white", "black", "black"), strict=True))


SIZE = (6.4, 3.6)


BLUE, VERMILION = "#31688e", "#d55e00"


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


# The seed's controller copies the rule and has its colour; a control by chance is grey.
CONTROLLER_COLOURS = {
    "seed": GROUP_STYLES["rule"][0],
    "commit": GROUP_STYLES["learned at commit"][0],
    "settle": GROUP_STYLES["learned at settle"][0],
    "same widths at random": "0.45",
}


# One look per signal of the gate, and per author of a token.
SIGNAL_STYLES = {
    "entropy": ("#0072b2", "o", "-"),
    "max_prob": ("#e69f00", "s", "--"),
    "margin": ("#009e73", "^", "-."),
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


def wrapped(text: str, inches: float, size: float) -> str:
    """`text` in lines of at most `inches`, for letters of `size` points (about half as wide as high)."""
    return "\n".join(textwrap.wrap(text, max(20, int(inches * 72 / (0.53 * size)))))


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at the left edge, wrapped to the figure's width; the figure grows by what they take."""
    width, height = figure.get_size_inches()
    title, subtitle = wrapped(title, width - 0.3, 11), wrapped(subtitle, width - 0.3, 8.5)
    below_title = 0.08 + 0.2 * (1 + title.count("\n"))
    heading = below_title + 0.15 * (1 + subtitle.count("\n")) + 0.1
    height += heading - 0.35
    figure.set_size_inches(width, height)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - heading / height))
    look = {"va": "top", "linespacing": 1.15}
    figure.text(0.1 / width, 1 - 0.08 / height, title, fontsize=11, fontweight="bold", **look)
    figure.text(0.1 / width, 1 - below_title / height, subtitle, fontsize=8.5, color="0.35", **look)


def frame(title: str, subtitle: str, size: tuple[float, float] = SIZE) -> tuple[Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=size)
    heading(figure, title, subtitle)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
