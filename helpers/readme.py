"""The README's tables, written from the results files between markers, so that they cannot say something else.

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`. To add one, write a function that returns
Markdown, enter it in `BLOCKS`, put the two markers into the README, and run `python -m helpers.publish --readme`.
"""

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import nbformat
import pandas as pd

from helpers.files import ROOT, atomic_path

README = ROOT / "README.md"
DATA = ROOT / "data"
RUNS = DATA / "notebook_runs.json"


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table.

    >>> print(markdown_table(["method", "KL"], [["static 4-bit", 0.5]]))
    | method | KL |
    |---|---|
    | static 4-bit | 0.5 |
    """
    header = list(header)
    lines = [header, *rows]
    text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(header), *text[1:]])


def interval(row: pd.Series, name: str, digits: int, scale: float = 1, sign: bool = False) -> str:
    """`value [low, high]` of the columns `name`, `name_low` and `name_high`.

    >>> interval(pd.Series({"kl": 0.25, "kl_low": 0.2, "kl_high": 0.3}), "kl", 2)
    '0.25 [0.20, 0.30]'
    """
    form = f"{'+' if sign else ''}.{digits}f"
    value, low, high = (format(scale * row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def _kl_digits(row: pd.Series) -> int:
    return 5 if row["kl"] < 0.001 else 4


def read_runs() -> dict[str, dict]:
    """What the last full run of each notebook took, by the notebook's name without ending (see `publish.Run`)."""
    return json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.is_file() else {}


def rounded_time(seconds: float) -> str:
    """A run time in words, rounded so that it holds for the next run as well.

    >>> rounded_time(47.3), rounded_time(100), rounded_time(492)
    ('50 s', '2 min', '8 min')
    """
    return f"{max(10, round(seconds, -1)):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def run_line(stem: str) -> str:
    """The sentence on run time and memory in the opening of a notebook."""
    run = read_runs().get(stem)
    if run is None:
        return "not measured yet"
    memory = run["peak_bytes"] / 2**30
    return f"{rounded_time(run['seconds'])}, peak memory {memory:.1f} GiB ({run['device']})"


def notebook_table() -> str:
    """Part, question and finding of each notebook as its opening gives them, and the measured run time."""
    rows, runs = [], read_runs()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        opening = nbformat.read(path, as_version=4).cells[0].source
        title = re.search(r"^# Part (.*)$", opening, re.M)
        asked = re.search(r"^\*\*Question:\*\* (.*)$", opening, re.M)
        found = re.search(r"^\*\*Finding:\*\* (.*)$", opening, re.M)
        if not (title and asked and found):
            raise ValueError(
                f"{path.name}: its first cell must hold '# Part N: ...', '**Question:**' and '**Finding:**'"
            )
        run = runs.get(path.stem)
        shown = f"{rounded_time(run['seconds'])}, {run['peak_bytes'] / 2**30:.1f} GiB" if run else "-"
        rows.append([f"[{path.stem}](notebooks/{path.name})", title[1], asked[1], found[1], shown])
    return markdown_table(["notebook", "part", "question", "finding", "run time, memory"], rows)


def comparison_table(name: str, latency: bool = False) -> str:
    """The methods of `data/NAME.csv` (see `comparison.save_comparison`)."""
    table = pd.read_csv(DATA / f"{name}.csv")
    static = table.set_index("method")["live_bytes"]["static 4-bit"]
    header = ["method", "code bits", "bytes / static 4-bit", "KL to full precision", "next-token accuracy, points"]
    if latency:
        header.append("time per token / full precision")
    rows = []
    for _, row in table.iterrows():
        full = row["method"] == "full precision"
        bits = "" if pd.isna(row["code_bits"]) else f"{row['code_bits']:.2f}"
        cells = [f"**{row['method']}**" if row["group"] == "learned at settle" else row["method"], bits]
        cells.append(f"{row['live_bytes'] / static:.2f}")
        cells.append("0" if full else interval(row, "kl", _kl_digits(row)))
        cells.append("" if full else interval(row, "accuracy_change", 2, 100, sign=True))
        rows.append([*cells, f"{row['latency_ratio']:.2f}"] if latency else cells)
    return markdown_table(header, rows)


def headline_table() -> str:
    """The main results, each with its interval and the command or notebook behind it."""
    name = "baseline_comparison_stories3M"
    table = pd.read_csv(DATA / f"{name}.csv").set_index("method")
    pairs = pd.read_csv(DATA / f"{name}_pairs.csv").query("of == 'kl'").set_index(["method", "against"])
    start, compare = "8-4-2 @2,5, best 25% by ", "`main.py compare`"
    learned, static = f"{start}learned score", table.loc["static 4-bit"]
    bytes_share = table.loc[learned, "live_bytes"] / static["live_bytes"]
    kl_share = table.loc[learned, "kl"] / static["kl"]

    def paired(method: str, other: str) -> str:
        row = pairs.loc[(method, other)]
        return f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]"

    usage = pd.read_csv(DATA / "gate_usage.csv").set_index("gate").loc["tracking 20%"]
    speed = pd.read_csv(DATA / "gate_speed.csv").set_index("of")
    gains = pd.read_csv(DATA / "gate_gains.csv").query("of == 'fidelity'").set_index("signal")
    rows = [
        ["learned at settle: bytes and KL over static 4-bit's", f"{bytes_share:.2f} and {kl_share:.2f}", compare],
        ["its KL minus that of a random choice on the same schedule", paired(learned, f"{start}random"), compare],
        ["... of attention x error, the best hand-made one", paired(learned, f"{start}attention x error"), compare],
        [f"its next-token accuracy at {table.loc[learned, 'code_bits']:.1f} code bits, points from full precision",
         interval(table.loc[learned], "accuracy_change", 2, 100, sign=True), compare],
        ["the entropy rule's KL minus that of its own widths at random",
         paired("rule-based dynamic", "random as rule-based dynamic"), compare],
        ["gate aimed at 20%: tokens of the large model (%)", interval(usage, "usage", 1), "notebook 05"],
        ["its speed-up over the large model", interval(speed.loc["speedup vs large"], "value", 2), "notebook 05"],
        ["... over assisted generation", interval(speed.loc["speedup vs assisted"], "value", 2), "notebook 05"],
        ["its fidelity (entropy) minus a random gate's", interval(gains.loc["entropy"], "gain", 3, sign=True),
         "notebook 05"],
    ]  # fmt: skip
    return markdown_table(["result", "value [95% interval]", "from"], rows)


def quality_table(name: str) -> str:
    """What fixed widths cost, from `data/NAME.csv` (`python main.py quality`)."""
    rows = []
    for _, row in pd.read_csv(DATA / f"{name}.csv").iterrows():
        text = row["text"].split(",")[0].replace("held-out text", "text")
        numbers = [f"{row['code_bits']:.2f}", f"{row['bits_per_element']:.2f}"]
        numbers += [interval(row, "kl", _kl_digits(row)), interval(row, "accuracy_change", 2, 100, sign=True)]
        rows.append([text, row["store"], *numbers])
    header = ["text", "store", "code bits", "bits per number", "KL to full precision", "next-token accuracy, points"]
    return markdown_table(header, rows)


def gate_usage_table() -> str:
    """The usage that each way of setting a threshold reaches, from `data/gate_usage.csv` (notebook 05)."""
    table = pd.read_csv(DATA / "gate_usage.csv")
    table["how"] = table["gate"].str.split().str[0]
    targets = sorted(table["target"].unique())
    rows = []
    for how, part in table.groupby("how", sort=False):
        by_target = part.set_index("target")
        rows.append([how, *(interval(by_target.loc[target], "usage", 1) for target in targets)])
    return markdown_table(["threshold", *(f"aimed at {target:g}%" for target in targets)], rows)


def gate_speed_table() -> str:
    """Speed-ups of the gate with intervals, from `data/gate_speed.csv` (notebook 05)."""
    table = pd.read_csv(DATA / "gate_speed.csv").set_index("of")
    speed = [name for name in table.index if name.startswith("speedup vs ")]
    rows = [[name.removeprefix("speedup vs "), interval(table.loc[name], "value", 2)] for name in speed]
    return markdown_table(["gated generation against", "speed-up"], rows)


def gate_gains_table() -> str:
    """What each signal gains over a random gate of the same usage, from `data/gate_gains.csv` (notebook 05)."""
    table = pd.read_csv(DATA / "gate_gains.csv").query("of == 'fidelity'")
    rows = [
        [row["signal"], interval(row, "gain", 3, sign=True), interval(row, "area", 3, sign=True)]
        for _, row in table.iterrows()
    ]
    return markdown_table(["signal", "fidelity over random at 20% usage", "over all usages (area)"], rows)


def collected_table() -> str:
    """Means and spreads of what notebook 01 collects, and each column's correlation with the width."""
    from helpers.collection import SEED_COLUMNS, read_training_data

    table = read_training_data(DATA / "controller_training.csv")[SEED_COLUMNS]
    units = {"entropy": " (nats)", "rarity": " (nats)", "latency": " (ms)"}
    correlations = table.corr()["kv_bits"]
    rows = []
    for name in SEED_COLUMNS:
        column = table[name]
        cells = [f"`{name}`{units.get(name, '')}", f"{column.mean():.4g} ({column.std():.3g})"]
        cells += [f"{column.min():.4g}", f"{column.max():.4g}"]
        rows.append([*cells, "" if name == "kv_bits" else f"{correlations[name]:+.2f}"])
    return markdown_table(["column", "mean (std)", "least", "largest", "correlation with `kv_bits`"], rows)


def pair_table() -> str:
    """The embedded models, from `data/models/measured.json` (`python main.py card`)."""
    measured = json.loads((DATA / "models" / "measured.json").read_text(encoding="utf-8"))
    large, small = measured["large"], measured["small"]
    share = "{:.1%} [{:.1%}, {:.1%}]".format
    rows = [
        ["bits per byte on held-out TinyStories", *(f"{each['bits_per_byte']:.3f}" for each in (large, small))],
        ["multiple choice, sum of log-probabilities (chance 25%)", share(*large["acc"]), share(*small["acc"])],
        ["multiple choice, per byte", share(*large["acc_norm"]), share(*small["acc_norm"])],
        ["time per token, as a share of the large one's", "1", f"{measured['time_ratio']:.2f}"],
    ]
    return markdown_table(["", "large (3.05 M)", "small (0.66 M)"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "notebooks": notebook_table,
    "headline": headline_table,
    "compare-stories3M": lambda: comparison_table("baseline_comparison_stories3M"),
    "compare-embedded": lambda: comparison_table("baseline_comparison", latency=True),
    "quality-stories3M": lambda: quality_table("quality_stories3M"),
    "quality-large": lambda: quality_table("quality_large"),
    "gate-usage": gate_usage_table,
    "gate-speed": gate_speed_table,
    "gate-gains": gate_gains_table,
    "collected": collected_table,
    "pair": pair_table,
}


def replace_block(text: str, name: str, content: str, where: str, inline: bool = False) -> str:
    """`text` with `content` between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    >>> replace_block("a <!-- run -->old<!-- /run -->", "run", "new", "x.md", inline=True)
    'a <!-- run -->new<!-- /run -->'

    Raises `ValueError` unless there is exactly one such pair.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{where}: expected '{start}' once, and '{end}' once after it")
    before, rest = text.split(start)
    _, after = rest.split(end)
    gap = "" if inline else "\n"
    return f"{before}{start}{gap}{content}{gap}{end}{after}"


def _names(text: str) -> list[str]:
    """Names of the blocks that a README has; `ValueError` for one that nobody writes."""
    names = re.findall(r"<!-- results:(\S+) -->", text)
    unknown = sorted(set(names) - BLOCKS.keys())
    if unknown:
        raise ValueError(f"README.md: no table is called {', '.join(unknown)}; there are {', '.join(BLOCKS)}")
    return names


def stale_blocks(path: Path | None = None) -> list[str]:
    """Names of the README's tables that differ from what the results files say."""
    text = (path or README).read_text(encoding="utf-8")
    return [name for name in _names(text) if _with_block(text, name) != text]


def write_readme(path: Path | None = None) -> list[str]:
    """Write all tables anew and return the names of those that changed."""
    path = path or README
    text, changed = path.read_text(encoding="utf-8"), stale_blocks(path)
    for name in changed:
        text = _with_block(text, name)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return changed


def _with_block(text: str, name: str) -> str:
    return replace_block(text, f"results:{name}", BLOCKS[name](), "README.md")
