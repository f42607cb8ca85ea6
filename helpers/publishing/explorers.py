"""Widgets for JupyterLab over precomputed tables: nothing is computed by a model while a slider moves.

Publishing removes what widgets draw, since GitHub cannot show it; each notebook shows the same as static figures first.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import ipywidgets as widgets
import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

from helpers.io import atomic_path, require
from helpers.publishing import plots

STATIC = "HELPERS_STATIC"  # set when notebooks are published: say that there is a widget instead of building it


def show(build: Callable[[], object]) -> None:
    """Display the widget that `build` makes, or on paper a line that says where to find it."""
    if os.environ.get(STATIC):
        print("(interactive: open this notebook in JupyterLab and run this cell)")
        return
    display(build())


def save_widths(path: str | Path, followed: pd.DataFrame, tokens: Sequence[str]) -> None:
    """Keep a result of `evaluation.length.follow_text` and the text of each token as JSON lines, for `load_widths`.

    Its peaks, which are not known for every block, are left out.
    """
    lines = [{"texts": list(tokens)}]
    for row in followed.drop(columns="peak_bytes").to_dict("records"):
        lines.append({**row, "bits": [round(float(bits), 2) for bits in row["bits"]]})
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def load_widths(path: str | Path) -> tuple[pd.DataFrame, list[str]]:
    """What `save_widths` kept: the widths after every block, and the text of each token."""
    with require(path, "03_controller_integration").open(encoding="utf-8") as file:
        first, *rest = (json.loads(line) for line in file)
    return pd.DataFrame(rest), first["texts"]


def width_explorer(followed: pd.DataFrame, tokens: Sequence[str], shown: int = 96):
    """Dropdown of methods and slider over the text: each token's width after so many tokens were read.

    `followed` is a result of `follow_text`, `tokens` the text of each token; the `shown` newest are drawn.
    """
    lengths = sorted(followed["tokens"].unique())
    names = list(followed["method"].unique())
    method = widgets.Dropdown(options=names, description="policy", layout={"width": "420px"})
    read = widgets.SelectionSlider(options=lengths, value=lengths[-1], description="tokens read")
    return _explorer(lambda: widths_after(followed, tokens, method.value, read.value, shown), [method, read])


def widths_after(
    followed: pd.DataFrame, tokens: Sequence[str], method: str, read: int, shown: int = 96, title: str | None = None
) -> Figure:
    """What `width_explorer` draws for one method after `read` tokens."""
    row = followed[(followed["method"] == method) & (followed["tokens"] == read)].iloc[0]
    first = max(0, read - shown)
    bits = row["bits"][first:read]
    held, live = (f"{row[name] / 1024:.0f}" for name in ("held_bytes", "live_bytes"))
    about = f"{method}; {held} KiB held ({live} live), {sum(row['bits']) / read:.2f} bits on average"
    return plots.tokens_by_width(tokens[first:read], bits, title or f"After {read} tokens", about)


def policy_explorer(table: pd.DataFrame):
    """A set of groups of policies and a slider of bytes (share of static 4-bit): those within both, best KL first."""
    groups = list(table["group"].unique())
    chosen = widgets.SelectMultiple(options=groups, value=groups, rows=len(groups), description="policies")
    budget = widgets.FloatSlider(value=1.0, min=0.5, max=2.0, step=0.05, description="bytes")
    return _explorer(lambda: within_budget(table, budget.value, chosen.value), [chosen, budget])


def within_budget(table: pd.DataFrame, budget: float, groups: Sequence[str] | None = None) -> Figure:
    """What `policy_explorer` draws: KL of the methods of `groups` (all by default) that fit the budget.

    The budget is a multiple of the bytes that static 4-bit storage holds.
    """
    static = table.set_index("method").loc["static 4-bit", "held_bytes"]
    part = table[(table["held_bytes"] <= budget * static) & (table["kl"] > 0)].sort_values("kl")
    if groups is not None:
        part = part[part["group"].isin(groups)]
    about = f"{len(part)} policies fit" if len(part) else "no policy of these fits: raise the budget or choose others"
    return plots.kl_bars(part, f"At most {budget:.2f} of the bytes that static 4-bit holds", about)


def gate_explorer(table: pd.DataFrame):
    """Dropdown of signals and slider over their thresholds: what each buys in fidelity and in time.

    `table` has the columns of `gate.study.summaries.summarise_gates`.
    """

    def thresholds() -> list[tuple[str, float]]:
        return [(f"{t:.3g}", t) for t in sorted(table.loc[table["signal"] == signal.value, "threshold"])]

    def follow(_) -> None:
        threshold.options = thresholds()

    signal = widgets.Dropdown(options=list(table["signal"].unique()), description="signal")
    threshold = widgets.SelectionSlider(options=thresholds(), description="threshold")
    signal.observe(follow, names="value")
    return _explorer(lambda: gate_at(table, signal.value, threshold.value), [signal, threshold])


def gate_at(table: pd.DataFrame, signal: str, threshold: float) -> Figure:
    """What `gate_explorer` draws: a signal's sweep with the row of the threshold nearest to `threshold`."""
    part = table[table["signal"] == signal].reset_index(drop=True)
    row = part.loc[(part["threshold"] - threshold).abs().idxmin()]
    title = f"{signal} above {row['threshold']:.3g}: the large model writes {row['usage']:.0%}"
    timed = "not timed" if pd.isna(row["speedup"]) else f"{row['speedup']:.2f} of at most {row['ideal']:.2f}"
    about = f"fidelity {row['fidelity']:.2f}; speed-up {timed}"
    return plots.gate_choice(part, row, title, about)


def _explorer(draw: Callable[[], Figure], controls: list):
    """The controls above an image that follows them."""
    import ipywidgets as widgets

    image = widgets.Image(format="png")

    def update(_=None) -> None:
        figure, buffer = draw(), io.BytesIO()
        figure.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        plt.close(figure)
        image.value = buffer.getvalue()

    for control in controls:
        control.observe(update, names="value")
    update()
    return widgets.VBox([*controls, image])
