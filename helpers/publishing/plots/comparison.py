"""Figures of notebook 04 but that of the benchmark."""

import pandas as pd
from adjustText import adjust_text
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from helpers.publishing.plots.style import DASHES, GROUP_STYLES, errors, frame, method_bars, panels

MOST_POINTS = 8  # of a picture whose points are labelled


def pareto(table: pd.DataFrame, x: str, y: str, labels: dict[str, str], title: str, subtitle: str,
           log: bool = False) -> Figure:  # fmt: skip
    """Methods as points coloured by `group`, `y` with its interval (`y_low`, `y_high`), each named beside its point.

    On a logarithmic axis, where less is better, a line joins those of ours that nothing of ours lies below. Raises
    `ValueError` for more than eight methods.
    """
    if len(table) > MOST_POINTS:
        raise ValueError(f"table must have at most {MOST_POINTS} methods to be labelled, got {len(table)}")
    figure, axes = frame(title, subtitle, (7.6, 4.6))
    reach = errors(table, y)
    for number, (group, at, value) in enumerate(table[["group", x, y]].itertuples(index=False)):
        colour, marker = GROUP_STYLES[group]
        axes.errorbar(at, value, reach[:, [number]], fmt=marker, color=colour, markersize=7, linewidth=1, zorder=3)
    if log:
        ours = table[~table["group"].isin(["stock", "full precision"])].sort_values([x, y])
        best = ours[ours[y] <= ours[y].cummin()]
        axes.plot(best[x], best[y], color="0.75", linewidth=1.2, zorder=1)
    else:
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yscale("log" if log else "linear")
    axes.set_xlabel(labels[x])
    axes.set_ylabel(labels[y])
    axes.margins(x=0.12, y=0.12)
    look = {"fontsize": 8.5, "path_effects": [withStroke(linewidth=3, foreground="white")], "zorder": 4}
    names = table["method"].str.replace(", best .* by learned score", ", learned", regex=True)
    placed = zip(names, table["group"], table[x], table[y], strict=True)
    if log:  # below the front nothing lies: its names stand there, all others above their points
        axes.margins(x=0.25)
        for name, group, at, value in placed:
            under = group not in ("stock", "full precision") and (best[x] == at).any() and (best[y] == value).any()
            where = {"xytext": (-7, -6), "ha": "right", "va": "top"} if under else {"xytext": (7, 6), "va": "bottom"}
            axes.annotate(name, (at, value), textcoords="offset points", color=GROUP_STYLES[group][0], **where, **look)
        return figure
    figure.canvas.draw()  # names are placed by what else is drawn
    texts = [
        axes.text(at, value, name, va="center", ha="center", color=GROUP_STYLES[group][0], **look)
        for name, group, at, value in placed
    ]
    line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.5}
    adjust_text(texts, table[x].to_numpy(), table[y].to_numpy(), ax=axes, expand=(1.3, 2.6), arrowprops=line,
                force_static=(0.3, 0.7), iter_lim=800, min_arrow_len=12)  # fmt: skip
    return figure


def against_length(table: pd.DataFrame, styles: dict[str, str], title: str, subtitle: str) -> Figure:
    """Held and live bytes, and time per token, against context length, a line a method; `styles`: method -> group."""
    figure, (left, right) = panels(title, subtitle, (8.6, 4.5), 2)
    for number, (name, part) in enumerate(table.groupby("method", sort=False)):
        colour, marker = GROUP_STYLES[styles[name]]
        look = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.3, "linestyle": DASHES[number % 4]}
        left.plot(part["tokens"], part["held_bytes"] / 2**20, label=name, **look)
        left.plot(part["tokens"], part["live_bytes"] / 2**20, **look | {"marker": "", "alpha": 0.45, "linewidth": 0.9})
        right.plot(part["tokens"], part["latency_ms"], **look)
    for axes, label in ((left, "held by the cache (MiB)"), (right, "time per token (ms)")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel(label)
    left.plot([], [], color="0.5", alpha=0.45, linewidth=0.9, label="thin, without markers: live bytes")
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    right.set_ylim(bottom=0)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def latency_bars(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Mean time per token of each `method` with its interval, coloured by `group`."""
    label = "mean time per token (ms)"
    return method_bars(table, "latency_ms", "latency_low", "latency_high", label, title, subtitle)
