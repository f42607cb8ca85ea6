"""Every figure, drawn from plain tables. One colour per width throughout, from a colour-blind safe sequence."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.files import atomic_path
from helpers.packed_store import CENTRE_TOKENS
from helpers.quantization import WIDTHS

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


def _heading(figure: Figure, title: str, subtitle: str) -> None:
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


def _frame(title: str, subtitle: str, size: tuple[float, float] = SIZE) -> tuple[Figure, plt.Axes]:
    figure, axes = plt.subplots(figsize=size)
    _heading(figure, title, subtitle)
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


def _width_look(bits: float) -> tuple[str, str]:
    """Colour and ink of a width; of an average width, those of the nearest width on a logarithmic scale."""
    nearest = WIDTHS[int(np.abs(np.log2(WIDTHS) - np.log2(bits)).argmin())]
    return WIDTH_COLOURS[nearest], WIDTH_INK[nearest]


def tokens_by_width(
    tokens: Sequence[str], widths: Sequence[float], title: str, subtitle: str, size_inches: float = 8.0
) -> Figure:
    """A text as boxes, one a token, coloured by its (average) width, with the number of bits under it."""
    looks = [_width_look(float(bits)) for bits in widths]
    return _token_boxes(tokens, looks, [f"{bits:.2g}" for bits in widths], title, subtitle, size_inches)


def tokens_by_author(
    tokens: Sequence[str], authors: Sequence[str], signal: Sequence[float], title: str, subtitle: str,
    size_inches: float = 8.0,
) -> Figure:  # fmt: skip
    """A gated text as boxes, one a token, coloured by the model that wrote it, with the signal's value under it."""
    looks = [AUTHOR_LOOKS[author] for author in authors]
    return _token_boxes(tokens, looks, [f"{value:.1f}" for value in signal], title, subtitle, size_inches)


def _token_boxes(
    tokens: Sequence[str], looks: Sequence[tuple[str, str]], notes: Sequence[str], title: str, subtitle: str,
    size_inches: float,
) -> Figure:  # fmt: skip
    """Boxes of (colour, ink) that flow like text, a small note under each."""
    figure = plt.figure(figsize=(size_inches, 2.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    renderer = figure.canvas.get_renderer()
    dots = figure.dpi * size_inches
    x, row, places = 0.01, 0, []
    for token, look, note in zip(tokens, looks, notes, strict=True):
        shown = token.replace("\n", "↵").strip() or "·"
        text = axes.text(0, 0, shown, fontsize=9.5)
        width = text.get_window_extent(renderer).width / dots + 0.016
        text.remove()
        if x + width > 0.99:
            x, row = 0.01, row + 1
        places.append((x, row, shown, look, note))
        x += width + 0.003
    rows = row + 1
    height = 0.75 + 0.42 * rows
    figure.set_size_inches(size_inches, height)
    for x, row, shown, (colour, ink), note in places:
        y = 1 - (0.85 + 0.42 * row) / height
        axes.text(x + 0.008, y, shown, fontsize=9.5, color=ink, va="baseline",
                  bbox={"facecolor": colour, "edgecolor": "none", "pad": 2.2})  # fmt: skip
        axes.text(x + 0.008, y - 0.145 / height, note, fontsize=6.5, color="0.25", va="baseline")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.text(0.01, 1 - 0.2 / height, title, fontsize=11, fontweight="bold", va="center")
    axes.text(0.01, 1 - 0.42 / height, subtitle, fontsize=8.5, color="0.35", va="center")
    return figure


def training_curves(logs: dict[str, pd.DataFrame], title: str, subtitle: str) -> Figure:
    """Training loss (`loss` in nats per token over `tokens` seen) of each model."""
    figure, axes = _frame(title, subtitle)
    looks = {"small": (BLUE, "--"), "large": (VERMILION, "-")}
    for name, log in logs.items():
        colour, dash = looks.get(name, ("black", ":"))
        axes.plot(log["tokens"] / 1e6, log["loss"], dash, color=colour, label=name)
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_ylim(top=min(axes.get_ylim()[1], 4.0))
    axes.legend(frameon=False)
    return figure


def learning_curves(histories: dict[str, object], title: str, subtitle: str) -> Figure:
    """Training and validation loss of several `controller.History`, one panel each; a dot marks the kept epoch."""
    figure, panels = plt.subplots(1, len(histories), figsize=(max(2.7 * len(histories), 4.4) + 0.6, 3.1))
    _heading(figure, title, subtitle)
    for axes, (name, history) in zip(np.atleast_1d(panels), histories.items(), strict=True):
        colour = CONTROLLER_COLOURS.get(name, "black")
        axes.plot(history.train, color=colour, linewidth=1.2, label="training")
        axes.plot(history.validation, "--", color=colour, linewidth=1.2, label="held-out texts")
        axes.plot(history.best, history.validation[history.best], "o", color=colour, markersize=5)
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(panels)[0].set_ylabel("loss")
    np.atleast_1d(panels)[-1].legend(frameon=False, fontsize=8)
    return figure


def confusion_matrices(pairs: dict[str, tuple[Sequence[int], Sequence[int]]], title: str, subtitle: str) -> Figure:
    """Counts and row shares of (label, predicted) widths, one panel a controller."""
    figure, panels = plt.subplots(1, len(pairs), figsize=(3.6 * len(pairs) + 0.4, 3.7))
    _heading(figure, title, subtitle)
    for axes, (name, (labels, predicted)) in zip(np.atleast_1d(panels), pairs.items(), strict=True):
        counts = np.array([[np.sum((labels == a) & (predicted == b)) for b in WIDTHS] for a in WIDTHS])
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        text = np.array([[f"{c}\n{s:.0%}" for c, s in zip(*row, strict=True)] for row in zip(counts, shares)])
        sns.heatmap(shares, annot=text, fmt="", cmap="Blues", vmin=0, vmax=1, square=True, cbar=False, ax=axes,
                    xticklabels=WIDTHS, yticklabels=WIDTHS, annot_kws={"fontsize": 8.5})  # fmt: skip
        axes.set_title(name, fontsize=9.5, loc="left")
        axes.set_xlabel("predicted bits")
        axes.set_ylabel("label (bits)")
    return figure


def importances(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Bars of `drop` with intervals (`low`, `high`) for each `feature`, one colour a `controller`."""
    figure, axes = _frame(title, subtitle, (6.4, 0.32 * len(table) + 1.6))
    names = [f"{row.feature}  ({row.controller})" for row in table.itertuples()]
    errors = np.stack([table["drop"] - table["low"], table["high"] - table["drop"]])
    colours = [CONTROLLER_COLOURS[kind] for kind in table["controller"]]
    axes.barh(names, table["drop"], color=colours, height=0.65, xerr=errors, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    axes.axvline(0, color="0.3", linewidth=0.8)
    axes.set_xlabel("loss of accuracy when the feature is shuffled (points)")
    return figure


def reliability(panels: dict[str, tuple[np.ndarray, np.ndarray]], title: str, subtitle: str, bins: int = 8) -> Figure:
    """Share that is right against the probability that the controller gave its choice; equal-count bins."""
    figure, axes = _frame(title, subtitle, (5.2, 4.2))
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1)
    for (name, (confidence, right)), colour, marker in zip(
        panels.items(), map(CONTROLLER_COLOURS.get, panels), "os", strict=False
    ):
        order = np.array_split(np.argsort(confidence), bins)
        points = [(confidence[i].mean(), right[i].mean(), 1.96 * right[i].std() / len(i) ** 0.5) for i in order]
        x, y, half = np.array(points).T
        axes.errorbar(x, y, half, fmt=f"{marker}-", color=colour, markersize=5, linewidth=1.2, label=name)
    axes.set_xlabel("probability of the chosen width")
    axes.set_ylabel("share that matches the label")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def rate_distortion(curves: dict[str, pd.DataFrame], points: dict[str, tuple[float, float]], title: str,
                    subtitle: str) -> Figure:  # fmt: skip
    """Cost against average bits: `curves` with columns `bits` and `cost`, `points` (bits, cost) by name."""
    figure, axes = _frame(title, subtitle, (6.4, 4.2))
    for (name, curve), style in zip(curves.items(), ("o-", "s--", "^-.", "D:"), strict=False):
        colour = next((c for kind, c in CONTROLLER_COLOURS.items() if name.startswith(kind)), "black")
        axes.plot(curve["bits"], curve["cost"], style, color=colour, markersize=4, linewidth=1.3, label=name)
    for name, (bits, cost) in points.items():
        axes.plot(bits, cost, "x", color="black", markersize=7)
        axes.annotate(name, (bits, cost), textcoords="offset points", xytext=(6, 4), fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("average width (bits)")
    axes.set_ylabel("mean cost per token (nats)")
    axes.legend(frameon=False, fontsize=8)
    return figure


def pareto(table: pd.DataFrame, x: str, y: str, labels: dict[str, str], title: str, subtitle: str,
           log: bool = False) -> Figure:  # fmt: skip
    """Methods as points coloured by `group`, `y` with its interval (`y_low`, `y_high`); a number names each method."""
    figure, axes = _frame(title, subtitle, (8.6, 4.6))
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
    _heading(figure, title, subtitle)
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


def bytes_over_text(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """`live_bytes` and `stored_bytes` of each `method` (with its `group`) against `tokens` read."""
    figure, axes = _frame(title, subtitle, (8.2, 3.6))
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
    figure, axes = _frame(title, subtitle, (7.6, 0.27 * len(table) + 1.5))
    errors = np.stack([table["kl"] - table["kl_low"], table["kl_high"] - table["kl"]])
    colours = [GROUP_STYLES[group][0] for group in table["group"]]
    axes.barh(table["method"], table["kl"], xerr=errors, color=colours, height=0.65, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    if len(table):
        axes.set_xscale("log")
    axes.set_xlabel("KL to full precision (nats per token)")
    axes.tick_params(axis="y", labelsize=8)
    return figure


def latency_bars(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Median time per token of each `method` with its interval, coloured by `group`."""
    figure, axes = _frame(title, subtitle, (7.6, 0.27 * len(table) + 1.5))
    errors = np.stack([table["latency_ms"] - table["latency_low"], table["latency_high"] - table["latency_ms"]]).clip(
        min=0
    )
    colours = [GROUP_STYLES[group][0] for group in table["group"]]
    axes.barh(table["method"], table["latency_ms"], xerr=errors, color=colours, height=0.65, error_kw={"linewidth": 1})
    axes.invert_yaxis()
    axes.set_xlabel("median time per token (ms)")
    axes.tick_params(axis="y", labelsize=8)
    return figure


def signal_distributions(
    values: dict[str, np.ndarray], thresholds: dict[str, float], label: str, title: str, subtitle: str
) -> Figure:
    """Histograms of a signal (share of the tokens of each text), with thresholds as named vertical lines."""
    figure, axes = _frame(title, subtitle)
    bins = np.linspace(0, max(array.max() for array in values.values()), 41)
    for (name, array), colour, fill in zip(values.items(), (BLUE, VERMILION), (0.35, 0.0), strict=False):
        weights = np.full(len(array), 100 / len(array))
        axes.hist(array, bins, weights=weights, histtype="stepfilled" if fill else "step", alpha=None,
                  color=(*plt.matplotlib.colors.to_rgb(colour), fill) if fill else colour, edgecolor=colour,
                  linewidth=1.3, label=name)  # fmt: skip
    for (name, threshold), style in zip(thresholds.items(), ("-", "--", ":"), strict=False):
        axes.axvline(threshold, color="black", linestyle=style, linewidth=1.2, label=f"{name}: {threshold:.2f}")
    axes.set_xlabel(label)
    axes.set_ylabel("share of tokens (%)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def gate_trace(table: pd.DataFrame, threshold: float, title: str, subtitle: str) -> Figure:
    """`signal` over the steps of one gated text (see `gate.trace`), the steps where the gate fired marked."""
    figure, axes = _frame(title, subtitle, (8.2, 3.2))
    axes.plot(table["step"], table["signal"], color=BLUE, linewidth=1.2)
    for fired, marker, size in ((False, "o", 14), (True, "D", 34)):
        part = table[table["fired"] == fired]
        colour = VERMILION if fired else BLUE
        label = f"{'large' if fired else 'small'} model writes ({len(part)})"
        axes.scatter(part["step"], part["signal"], s=size, color=colour, marker=marker, zorder=3, label=label)
    axes.axhline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold, {threshold:.2f}")
    axes.set_xlabel("token written")
    axes.set_ylabel("entropy of the small model (bits)")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def against_usage(
    table: pd.DataFrame, y: str, ends: tuple[float, float] | None, label: str, title: str, subtitle: str,
    axes: plt.Axes | None = None,
) -> Figure:  # fmt: skip
    """`y` with interval (`_low`, `_high`) against measured `usage`, one line a `signal`.

    `ends` are the values of the small model alone and of the large one; lines are drawn from the one to the other.
    """
    figure, axes = _frame(title, subtitle, (6.8, 4.2)) if axes is None else (axes.figure, axes)
    for signal, part in table.groupby("signal", sort=False):
        colour, marker, dash = SIGNAL_STYLES[signal]
        part = part.sort_values("usage")
        errors = np.stack([part[y] - part[f"{y}_low"], part[f"{y}_high"] - part[y]]).clip(min=0)
        axes.errorbar(100 * part["usage"], part[y], errors, fmt=marker, color=colour, markersize=6, linewidth=1,
                      capsize=2, label=signal)  # fmt: skip
        points = part[["usage", y]].to_numpy()
        if ends is not None:
            points = np.array([(0, ends[0]), *points, (1, ends[1])])
        axes.plot(100 * points[:, 0], points[:, 1], dash, color=colour, linewidth=1.1)
    if ends is not None:
        axes.plot([0, 100], ends, "k|", markersize=9)
    axes.set_xlabel("tokens that the large model wrote (%)")
    axes.set_ylabel(label)
    axes.legend(title="signal", title_fontsize=8, frameon=False, fontsize=8, loc="center left",
                bbox_to_anchor=(1.0, 0.5))  # fmt: skip
    return figure


def speedup_against_usage(
    table: pd.DataFrame, others: dict[str, float], title: str, subtitle: str, axes: plt.Axes | None = None
) -> Figure:
    """`speedup` over the large model with interval against `usage`, the ideal 1 / (c + p), and `others` as lines."""
    figure, axes = _frame(title, subtitle, (6.8, 4.2)) if axes is None else (axes.figure, axes)
    cost_ratio = float(table["cost_ratio"].mean())
    usage = np.linspace(0, 1, 101)
    axes.plot(100 * usage, 1 / (cost_ratio + usage), color="black", linewidth=1.2,
              label=f"ideal 1 / (c + p), c = {cost_ratio:.2f}")  # fmt: skip
    for signal, part in table.groupby("signal", sort=False):
        colour, marker, dash = SIGNAL_STYLES[signal]
        part = part.sort_values("usage")
        errors = np.stack([part["speedup"] - part["speedup_low"], part["speedup_high"] - part["speedup"]]).clip(min=0)
        axes.errorbar(100 * part["usage"], part["speedup"], errors, fmt=f"{marker}{dash}", color=colour, markersize=6,
                      linewidth=1.1, capsize=2, label=signal)  # fmt: skip
    for (name, value), style in zip(others.items(), ("--", ":", "-."), strict=False):
        axes.axhline(value, color="0.5", linestyle=style, linewidth=1.1, label=f"{name}: {value:.2f}")
    axes.set_xlabel("tokens that the large model wrote (%)")
    axes.set_ylabel("speed-up over the large model (per token)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def gate_choice(table: pd.DataFrame, chosen: pd.Series, title: str, subtitle: str) -> Figure:
    """Fidelity and speed-up against usage of one signal's sweep, the row `chosen` ringed in both panels."""
    figure, panels = plt.subplots(1, 2, figsize=(8.6, 3.6))
    _heading(figure, title, subtitle)
    against_usage(table, "fidelity", None, "fidelity: ROUGE-L to the large model", "", "", panels[0])
    speedup_against_usage(table, {}, "", "", panels[1])
    for axes, y in zip(panels, ("fidelity", "speedup"), strict=True):
        axes.plot(100 * chosen["usage"], chosen[y], "o", markersize=15, markerfacecolor="none", color=VERMILION)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(0, 100)
        axes.get_legend().remove()
    return figure
