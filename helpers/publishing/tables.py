"""What the tables of the README say: one function a table, from the results files in `data/` to Markdown."""

import json
from collections.abc import Callable, Iterable

import pandas as pd

from helpers.evaluation.benchmark.results import describe_machine, load_benchmarks, ratio_table
from helpers.evaluation.benchmark.targets import CPU_TARGETS, CUDA_TARGETS, check_targets
from helpers.gate.study.parts import parts_against_ideal
from helpers.io.paths import ROOT

DATA = ROOT / "data"


BENCHMARKS = DATA / "benchmarks"


MULTIPLE_CHOICE = "multiple_choice_stories3M"


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
    gains = pd.read_csv(DATA / "gate_fidelity_gains.csv").query("of == 'fidelity'").set_index("signal")
    share = _gate_benchmarks()["embedded"]["speed"]["share"]
    rows = [
        ["learned at settle: bytes and KL over static 4-bit's", f"{bytes_share:.2f} and {kl_share:.2f}", compare],
        ["its KL minus that of a random choice on the same schedule", paired(learned, f"{start}random"), compare],
        ["... of attention x error, the best hand-made one", paired(learned, f"{start}attention x error"), compare],
        [f"its next-token accuracy at {table.loc[learned, 'code_bits']:.1f} code bits, points from full precision",
         interval(table.loc[learned], "accuracy_change", 2, 100, sign=True), compare],
        ["the entropy rule's KL minus that of its own widths at random",
         paired("rule-based dynamic", "random as rule-based dynamic"), compare],
        *_decode_rows(),
        ["gate aimed at 20%: tokens of the large model (%)", interval(usage, "usage", 1), "notebook 05"],
        [f"speed-up of a gate at {100 * speed.loc['usage', 'value']:.0f}% over the large model",
         interval(speed.loc["speedup vs large"], "value", 2), "notebook 05"],
        ["... over assisted generation", interval(speed.loc["speedup vs assisted"], "value", 2), "notebook 05"],
        ["share of the ideal speed-up that arrives (bar: 0.85)", f"{share:.2f}",
         "`main.py gate-bench --pair embedded`"],
        ["fidelity of the entropy gate minus a random gate's, 20% usage",
         interval(gains.loc["entropy"], "gain", 3, sign=True), "`main.py gate-fidelity`"],
    ]  # fmt: skip
    return markdown_table(["result", "value [95% interval]", "from"], rows)


def _decode_rows() -> list[list[str]]:
    """Time of a decode step over DynamicCache's at the longest context that was measured on a CPU; none without it."""
    try:
        table = load_benchmarks(BENCHMARKS)
    except FileNotFoundError:
        return []
    table = table[(table["kind"] == "decode") & (table["dtype"] == "float32") & table["ratio"].notna()]
    rows = []
    for method in ("static 4-bit", "learned 8-4-2"):
        longest = table[table["method"] == method].nlargest(1, "context")
        for _, row in longest.iterrows():
            what = f"{method}: time of a decode step after {row['context']:,} tokens, over `DynamicCache`'s"
            rows.append([f"{what} ({row['shape']} shape, CPU)", interval(row, "ratio", 2), "`main.py bench`"])
    return rows


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
    from helpers.training.table import ASSIGNMENT_COLUMNS, read_training_data

    table = read_training_data(DATA / "controller_training.csv")[ASSIGNMENT_COLUMNS]
    units = {"entropy": " (nats)", "rarity": " (nats)", "latency": " (ms)"}
    correlations = table.corr()["kv_bits"]
    rows = []
    for name in ASSIGNMENT_COLUMNS:
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


def gate_fidelity_table() -> str:
    """What each signal gains over a random gate at 20% usage, from `data/gate_fidelity_gains.csv`."""
    table = pd.read_csv(DATA / "gate_fidelity_gains.csv")
    digits = {"fidelity": 3, "shared_prefix": 1, "rougeL": 4}
    by_signal = {of: part.set_index("signal") for of, part in table.groupby("of")}
    rows = [
        [signal, *(interval(by_signal[of].loc[signal], "gain", digits[of], sign=True) for of in digits)]
        for signal in by_signal["fidelity"].index
    ]
    header = ["signal", "fidelity", "tokens before the first that differs", "ROUGE-L to the human continuation"]
    return markdown_table(header, rows)


def _gate_benchmarks() -> dict[str, dict]:
    """The files of `python main.py gate-bench` by pair, the fastest pair first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARKS.glob("gate_*.json"))]
    files.sort(key=lambda each: each["ms_per_token"]["gated"])
    return {each["settings"]["pair"]: each for each in files}


def gate_sizes_table() -> str:
    """Speed of the gate with models of several sizes, from `data/benchmarks/gate_*.json`."""
    rows = []
    for pair, result in _gate_benchmarks().items():
        speed, weights = result["speed"], result["weights"]
        sizes = " + ".join(f"{weights[name] / 1e6:.2f} M" for name in ("small", "large"))
        name = f"{pair} ({sizes})" if pair == "embedded" else pair
        ms = [result["ms_per_token"][key] for key in ("small", "large", "gated")]
        times = " / ".join(f"{each:,.0f}" if each >= 20 else f"{each:.2f}" for each in ms)
        rows.append([
            f"{name}, {result['settings']['prompts']} prompts", result["provenance"]["threads"], times,
            f"{speed['usage']:.1%}", interval(pd.Series(speed), "speedup", 2), f"{speed['ideal']:.2f}",
            f"{speed['share']:.2f}", f"{speed['share_with_prompt']:.2f}",
        ])  # fmt: skip
    header = ["pair", "threads", "ms per token: small / large / gated", "usage", "speed-up", "ideal 1/(c + p)",
              "share of it", "once the prompt is counted"]  # fmt: skip
    return markdown_table(header, rows)


def gate_parts_table() -> str:
    """Where a gated token's time goes, and in brackets where the ideal's would, from the same files."""
    results = _gate_benchmarks()
    parts = {pair: parts_against_ideal(each["speed"], each["parts"]) for pair, each in results.items()}
    rows = [
        [part, *(f"{table.loc[part, 'gated']:.3f} ({table.loc[part, 'ideal']:.3f})" for table in parts.values())]
        for part in next(iter(parts.values())).index
    ]
    return markdown_table(["in units of the large model's time per token", *parts], rows)


def benchmark_table() -> str:
    """Attention and decode steps against the library's caches, machine by machine, and the bars (`main.py bench`)."""
    try:
        measured = load_benchmarks(BENCHMARKS)
    except FileNotFoundError:
        return "*Not measured yet: `python main.py bench` writes the files that this table is made of.*"
    parts = []
    for device, table in measured.groupby("device"):
        ratios = ratio_table(table)
        ratios = ratios.loc[:, (ratios != "").any()]
        rows = [[name, *row] for name, row in zip(ratios.index, ratios.to_numpy())]
        parts.append(f"{describe_machine(table)}:\n\n{markdown_table(['what', *ratios.columns], rows)}")
        bars = check_targets(table, CPU_TARGETS if str(table["dtype"].iloc[0]) == "float32" else CUDA_TARGETS)
        bars = bars[bars["result"] != "not measured"]
        if bars.empty:
            continue
        lines = [f"Bars set beforehand, {(bars['result'] == 'met').sum()} of {len(bars)} met on {device}:", ""]
        for bar in bars.to_dict("records"):
            known = f" [{bar['low']:.2f}, {bar['high']:.2f}]" if bar["low"] == bar["low"] else ""
            lines.append(f"* {bar['result']}: {bar['target']}; measured {bar['measured']:.2f}{known}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def multiple_choice_table() -> str:
    """HellaSwag under each policy, from `data/multiple_choice_stories3M.csv`; nothing while that does not exist."""
    path = DATA / f"{MULTIPLE_CHOICE}.csv"
    if not path.is_file():
        return ""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    rows = []
    for _, row in pd.read_csv(path).dropna(subset="acc_norm").iterrows():
        full = row["method"] == "full precision"
        cells = [row["method"], "" if pd.isna(row["code_bits"]) else f"{row['code_bits']:.2f}"]
        for name in ("acc", "acc_norm"):
            cells.append(interval(row, name, 1, 100))
            cells.append("" if full else interval(row, f"{name}_change", 2, 100, sign=True))
        rows.append(cells)
    header = ["method", "code bits on stories", "accuracy, %", "minus full precision's, points", "accuracy per byte, %",
              "minus full precision's, points"]  # fmt: skip
    count = about["item_count"]
    about = f"{count:,} items, model {about['model'].split('/')[-1]}; chance is 25%."
    about += " Contexts are read and committed first, endings score in a second pass; differences are paired by item."
    command = "python main.py compare --model M --texts T --controllers CONTROLLERS --rounds 0 --max-rows 25 \\\n"
    command += f"  --items HELLASWAG.jsonl --count {count} --name {MULTIPLE_CHOICE}"
    return f"### HellaSwag\n\n{about}\n\n```bash\n{command}\n```\n\n{markdown_table(header, rows)}"


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline_table,
    "compare-stories3M": lambda: comparison_table("baseline_comparison_stories3M"),
    "compare-embedded": lambda: comparison_table("baseline_comparison", latency=True),
    "quality-stories3M": lambda: quality_table("quality_stories3M"),
    "quality-large": lambda: quality_table("quality_large"),
    "benchmarks": benchmark_table,
    "multiple-choice": multiple_choice_table,
    "gate-usage": gate_usage_table,
    "gate-speed": gate_speed_table,
    "gate-gains": gate_gains_table,
    "gate-fidelity": gate_fidelity_table,
    "gate-sizes": gate_sizes_table,
    "gate-parts": gate_parts_table,
    "collected": collected_table,
    "pair": pair_table,
}
