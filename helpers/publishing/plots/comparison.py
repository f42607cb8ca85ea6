"""Figures of notebook 04."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from helpers.publishing.plots.style import GROUP_STYLES, frame, heading


def pareto(table: pd.DataFrame, x: str, y: str, labels: dict[str, str], title: str, subtitle: str,
           log: bool = False) -> Figure:  # fmt: skip
    """Methods as points coloured by `group`, `y` with its interval (`y_low`, `y_high`); a number names each method."""
    figure, axes = frame(title, subtitle, (8.6, 4.6))
    lines = []
    for number, row in enumerate(table.to_dict("records"), start=1):
        colour, marker = GROUP_STYLES.get(row["group"], ("black", "o"))
        error = [[max(row[y] - row[f"{y}_low"], 0)], [max(row[f"{y}_high"] - row[y], 0)]]
        axes.errorbar(row[x], row[y], error, fmt=marker, color=colour, markersize=6, linewidth=1)
        handle = plt.Line2D([], [], color=colour, marker=marker, linestyle="", markersize=5)
        lines.append((handle, f"{number}  {row['method']}"))
    axes.set_yscale("log" if log else "linear")
    if not log:
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--", zorder=0)
        lines.insert(0, (plt.Line2D([], [], color="black", linewidth=0.8, linestyle="--"), "full precision"))
    axes.set_xlabel(labels[x])
    axes.set_ylabel(labels[y])
    axes.margins(x=0.07, y=0.07)
    handles, names = zip(*lines, strict=True)
    axes.legend(handles, names, frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    _number_points(axes, table[[x, y]].to_numpy(float))
    return figure


def _number_points(axes: plt.Axes, points: np.ndarray) -> None:
    """Number `points` `[n, 2]` from 1 on, each where neither a point nor another number is in the way."""
    axes.figure.canvas.draw()
    places = axes.transData.transform(points) * 72 / axes.figure.dpi
    taken = [(x, y, 4.0) for x, y in places]
    ring = [(r * np.cos(a), r * np.sin(a)) for r in (10, 16, 23, 31, 40) for a in np.arange(0.6, 2 * np.pi, 0.52)]
    for number, (x, y) in enumerate(places):
        free = (d for d in ring if all(np.hypot(x + d[0] - u, y + d[1] - v) > 5 + size for u, v, size in taken))
        dx, dy = next(free, ring[0])
        taken.append((x + dx, y + dy, 5.0))
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5, "shrinkB": 2} if np.hypot(dx, dy) > 12 else None
        look = {"fontsize": 7.5, "ha": "center", "va": "center", "arrowprops": line}
        axes.annotate(str(number + 1), points[number], xytext=(dx, dy), textcoords="offset points", **look)


def against_length(table: pd.DataFrame, styles: dict[str, str], title: str, subtitle: str) -> Figure:
    """Live bytes and time per token against context length, one line a method; `styles`: method -> group."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.5))
    heading(figure, title, subtitle)
    dashes = ("-", "--", "-.", ":")
    for number, (name, part) in enumerate(table.groupby("method", sort=False)):
        colour, marker = GROUP_STYLES[styles[name]]
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3}
        left.plot(part["tokens"], part["live_bytes"] / 2**20, dashes[number % 4], label=name, **look)
        right.plot(part["tokens"], part["latency_ms"], dashes[number % 4], **look)
    for axes, label in ((left, "live bytes of the cache (MiB)"), (right, "time per token (ms)")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0 if axes is right else None)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def latency_bars(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Median time per token of each `method` with its interval, coloured by `group`."""
    figure, axes = frame(title, subtitle, (7.6, 0.27 * len(table) + 1.5))
    errors = np.stack([table["latency_ms"] - table["latency_low"], table["latency_high"] - table["latency_ms"]]).clip(
        min=0
    )
    colours = [GROUP_STYLES[group][0] for group in table["group"]]
    axes.barh(table["method"], table["latency_ms"], xerr=errors, color=colours, height=0.65, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    axes.set_xlabel("median time per token (ms)")
    axes.tick_params(axis="y", labelsize=8)
    return figure
