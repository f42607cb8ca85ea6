"""The figure of the benchmark: time against context, a panel for each kind, shape and batch of one machine."""

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from helpers.publishing.plots.style import DASHES, GROUP_STYLES, errors

COLUMNS_WIDE = 3
# A panel shows no more lines than can be told apart; the table beside it has every method.
SHOWN = ("DynamicCache", "StaticCache", "static 4-bit", "learned 8-4-2", "stock quanto 4-bit")
LABELS = {"attention": "attention of one layer", "decode": "decoding a token"}


def benchmark_figure(table: pd.DataFrame, title: str | None = None) -> Figure:
    """Median time with its interval against context for the methods `SHOWN`, from `load_benchmarks()` of one `device`.

    One panel each for attention and whole decode steps, of every shape and batch; without `title` it says how much of
    DynamicCache's time 4-bit attention takes at the longest context. Raises `ValueError` where the table holds
    several machines or neither kind.
    """
    devices = sorted(table["device"].unique())
    shown = table[table["kind"].isin(LABELS) & table["method"].isin(SHOWN) & table["ms"].notna()]
    if len(devices) != 1 or shown.empty:
        raise ValueError(f"table must hold attention or decode steps of one machine, got {', '.join(devices)}")
    cases = list(shown.groupby(["kind", "shape", "batch"], sort=False))
    wide = min(COLUMNS_WIDE, len(cases))
    high = -(-len(cases) // wide)
    figure, grid = plt.subplots(high, wide, figsize=(8.6, 2.9 * high + 1.7), layout="constrained", squeeze=False)
    looks = _looks(shown)
    for axes, ((kind, shape, batch), part) in zip(grid.flat, cases):
        for name, line in part.sort_values("context").groupby("method", sort=False):
            size = {"markersize": 4, "linewidth": 1.2, "elinewidth": 0.8}
            axes.errorbar(line["context"], line["ms"], errors(line, "ms"), **size, **looks[name])
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        contexts = sorted(part["context"].unique())
        axes.set_xticks(contexts, [_short(context) for context in contexts])
        axes.minorticks_off()
        low, high_end = axes.get_ylim()
        steps = (1, 1.5, 2, 3, 5, 7) if high_end < 10 * low else (1, 2, 5) if high_end < 100 * low else (1, 3)
        axes.yaxis.set_major_locator(LogLocator(subs=steps))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_title(f"{LABELS[kind]}\n{shape}, batch {batch}", loc="left", fontsize=9)
        axes.set_xlabel("context (tokens)")
        axes.set_ylabel("ms")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(cases) :]:
        axes.axis("off")
    handles = [plt.Line2D([], [], markersize=4, linewidth=1.2, label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.suptitle(f"{title or _finding(shown)}\n", x=0.01, ha="left", fontsize=11, fontweight="bold")
    height = figure.get_size_inches()[1]
    figure.text(0.01, 1 - 0.4 / height, _subtitle(shown), fontsize=8.5, color="0.35")
    return figure


def _looks(table: pd.DataFrame) -> dict[str, dict[str, object]]:
    """The colour and marker of each method's group; members of a group differ in dashes."""
    methods = table.drop_duplicates("method")[["method", "group"]]
    looks = {}
    for name, group, number in methods.assign(number=methods.groupby("group").cumcount()).itertuples(index=False):
        colour, marker = GROUP_STYLES[group]
        looks[name] = {"color": colour, "marker": marker, "linestyle": DASHES[number % len(DASHES)]}
    return looks


def _short(context: int) -> str:
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)


def _finding(table: pd.DataFrame) -> str:
    ours = table[(table["method"] == "static 4-bit") & table["ratio"].notna()]
    if ours.empty:
        return "Time against context"
    longest = ours.sort_values(["kind", "context"]).drop_duplicates("kind", keep="last")
    parts = [f"{row.ratio:.2f} ({row.kind}, {_short(row.context)})" for row in longest.itertuples()]
    return f"Time of 4-bit over DynamicCache's: {' and '.join(parts)}"


def _subtitle(table: pd.DataFrame) -> str:
    rounds = sorted({len(times) for times in table["round_ms"]})
    first = table.iloc[0]
    return (
        f"{first['device']}, {first['threads']} threads, {first['dtype']}; "
        f"medians of {' or '.join(map(str, rounds))} interleaved rounds with 95% intervals"
    )
