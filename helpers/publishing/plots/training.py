"""Figures of notebook 02, and of pretraining."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.cache.quantization import WIDTHS
from helpers.publishing.plots.style import BLUE, CONTROLLER_COLOURS, VERMILION, frame, heading


def training_curves(logs: dict[str, pd.DataFrame], title: str, subtitle: str) -> Figure:
    """Training loss (`loss` in nats per token over `tokens` seen) of each model."""
    figure, axes = frame(title, subtitle)
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
    heading(figure, title, subtitle)
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
    heading(figure, title, subtitle)
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
    figure, axes = frame(title, subtitle, (6.4, 0.32 * len(table) + 1.6))
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
    figure, axes = frame(title, subtitle, (5.2, 4.2))
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
    figure, axes = frame(title, subtitle, (6.4, 4.2))
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
