"""Figures of notebook 02, and of pretraining."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers.cache import WIDTHS
from helpers.publishing.plots.style import BLUE, CONTROLLER_COLOURS, VERMILION, errors, frame, panels


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
    """Training and validation loss of several fits (`History`), one panel each; a dot marks the kept epoch."""
    figure, axes = panels(title, subtitle, (max(2.7 * len(histories), 4.4) + 0.6, 3.1), len(histories))
    for each, (name, history) in zip(axes, histories.items(), strict=True):
        colour = CONTROLLER_COLOURS.get(name, "black")
        each.plot(history.train, color=colour, linewidth=1.2, label="training")
        each.plot(history.validation, "--", color=colour, linewidth=1.2, label="held-out texts")
        each.plot(history.best, history.validation[history.best], "o", color=colour, markersize=5)
        each.set_title(name, fontsize=9, loc="left")
        each.set_xlabel("epoch")
        each.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes[0].set_ylabel("loss")
    axes[-1].legend(frameon=False, fontsize=8)
    return figure


def confusion_matrices(pairs: dict[str, tuple[Sequence[int], Sequence[int]]], title: str, subtitle: str) -> Figure:
    """Counts and row shares of (label, predicted) widths, one panel a controller."""
    figure, axes = panels(title, subtitle, (3.6 * len(pairs) + 0.4, 3.7), len(pairs))
    for each, (name, (labels, predicted)) in zip(axes, pairs.items(), strict=True):
        counts = pd.crosstab(pd.Categorical(labels, WIDTHS), pd.Categorical(predicted, WIDTHS), dropna=False)
        counts = counts.to_numpy()
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        text = np.array([f"{c}\n{s:.0%}" for c, s in zip(counts.flat, shares.flat)]).reshape(counts.shape)
        look = {"cmap": "Blues", "vmin": 0, "vmax": 1, "square": True, "cbar": False, "annot_kws": {"fontsize": 8.5}}
        sns.heatmap(shares, annot=text, fmt="", xticklabels=WIDTHS, yticklabels=WIDTHS, ax=each, **look)
        each.set_title(name, fontsize=9.5, loc="left")
        each.set_xlabel("predicted bits")
        each.set_ylabel("label (bits)")
    return figure


def importances(table: pd.DataFrame, title: str, subtitle: str) -> Figure:
    """Bars of `drop` with intervals (`low`, `high`) for each `feature`, a panel with its own scale a `controller`."""
    parts = dict(list(table.groupby("controller", sort=False)))
    most = max(map(len, parts.values()))
    figure, axes = panels(title, subtitle, (8.2, 0.34 * most + 1.7), len(parts))
    for panel, (name, part) in zip(axes, parts.items(), strict=True):
        look = {"color": CONTROLLER_COLOURS.get(name), "height": 0.65, "error_kw": {"linewidth": 1}}
        panel.barh(part["feature"], part["drop"], xerr=errors(part, "drop", "low", "high"), **look)
        panel.axvline(0, color="0.3", linewidth=0.8)
        panel.set_ylim(most - 0.5, -0.5)
        panel.set_title(name, fontsize=9.5, loc="left")
        panel.set_xlabel("loss of accuracy when shuffled (points)")
    return figure


def reliability(
    curves: dict[str, tuple[np.ndarray, np.ndarray]], title: str, subtitle: str, bins: int = 8,
    labels: tuple[str, str] = ("probability of the chosen width", "share that matches the label"),
) -> Figure:  # fmt: skip
    """Share that is right against the probability that the controller gave its choice; equal-count bins."""
    figure, axes = frame(title, subtitle, (5.6, 4.2))
    lowest = 1.0
    for (name, (confidence, right)), marker in zip(curves.items(), "os", strict=False):
        order = np.array_split(np.argsort(confidence), bins)
        points = [(confidence[i].mean(), right[i].mean(), 1.96 * right[i].std() / len(i) ** 0.5) for i in order]
        x, y, half = np.array(points).T
        look = {"color": CONTROLLER_COLOURS.get(name), "markersize": 5, "linewidth": 1.2, "label": name}
        axes.errorbar(x, y, half, fmt=f"{marker}-", **look)
        lowest = min(lowest, x.min(), (y - half).min())
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=0)
    axes.set_xlim(lowest - 0.02, 1.01)  # where its points are, not from 0
    axes.set_ylim(lowest - 0.02, 1.01)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
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
