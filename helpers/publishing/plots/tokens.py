"""A text as coloured boxes, one a token, with a key to the colours."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from helpers.cache import WIDTHS
from helpers.publishing.plots.style import AUTHOR_LOOKS, WIDTH_COLOURS, WIDTH_INK


def _width_look(bits: float) -> tuple[str, str]:
    """Colour and ink of a width; of an average width, those of the nearest width on a logarithmic scale."""
    nearest = WIDTHS[int(np.abs(np.log2(WIDTHS) - np.log2(bits)).argmin())]
    return WIDTH_COLOURS[nearest], WIDTH_INK[nearest]


def tokens_by_width(
    tokens: Sequence[str], widths: Sequence[float], title: str, subtitle: str, size_inches: float = 8.0
) -> Figure:
    """A text as boxes, one a token, coloured by its (average) width, with the number of bits under it."""
    looks = [_width_look(float(bits)) for bits in widths]
    key = {f"{bits} bits": _width_look(bits) for bits in WIDTHS}
    return _token_boxes(tokens, looks, [f"{bits:.2g}" for bits in widths], key, title, subtitle, size_inches)


def tokens_by_author(
    tokens: Sequence[str], authors: Sequence[str], signal: Sequence[float], title: str, subtitle: str,
    size_inches: float = 8.0,
) -> Figure:  # fmt: skip
    """A gated text as boxes, one a token, coloured by the model that wrote it, with the signal's value under it."""
    looks = [AUTHOR_LOOKS[author] for author in authors]
    key = {f"{author} model": look for author, look in AUTHOR_LOOKS.items()}
    return _token_boxes(tokens, looks, [f"{value:.1f}" for value in signal], key, title, subtitle, size_inches)


def _token_boxes(
    tokens: Sequence[str], looks: Sequence[tuple[str, str]], notes: Sequence[str], key: dict[str, tuple[str, str]],
    title: str, subtitle: str, size_inches: float,
) -> Figure:  # fmt: skip
    """Boxes of (colour, ink) that flow like text, a small note under each; `key` names the colours."""
    figure = plt.figure(figsize=(size_inches, 2.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    renderer = figure.canvas.get_renderer()

    def width_of(label: str, size: float) -> float:
        text = axes.text(0, 0, label, fontsize=size)
        width = text.get_window_extent(renderer).width / (figure.dpi * size_inches)
        text.remove()
        return width + 0.016

    x, row, places = 0.01, 0, []
    for token, look, note in zip(tokens, looks, notes, strict=True):
        shown = token.replace("\n", "↵").strip() or "·"
        width = width_of(shown, 9.5)
        if x + width > 0.99:
            x, row = 0.01, row + 1
        places.append((x, row, shown, look, note))
        x += width + 0.003
    keys, x = [], 0.01
    for label, look in key.items():
        keys.append((x, label, look))
        x += width_of(label, 8) + 0.006
    height = 1.03 + 0.42 * (row + 1)
    figure.set_size_inches(size_inches, height)
    boxed = {"edgecolor": "none", "pad": 2.2}
    for x, row, shown, (colour, ink), note in places:
        y = 1 - (1.13 + 0.42 * row) / height
        axes.text(x + 0.008, y, shown, fontsize=9.5, color=ink, va="baseline", bbox=boxed | {"facecolor": colour})
        axes.text(x + 0.008, y - 0.145 / height, note, fontsize=6.5, color="0.25", va="baseline")
    for x, label, (colour, ink) in keys:
        axes.text(x + 0.008, 1 - 0.71 / height, label, fontsize=8, color=ink, va="center",
                  bbox=boxed | {"facecolor": colour})  # fmt: skip
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.text(0.01, 1 - 0.2 / height, title, fontsize=11, fontweight="bold", va="center")
    axes.text(0.01, 1 - 0.42 / height, subtitle, fontsize=8.5, color="0.35", va="center")
    return figure
