"""Tables on gated generation: usage, speed, what a signal is worth, speed at real sizes and its parts."""

import json

import pandas as pd

from helpers.gate.study import parts_against_ideal
from helpers.publishing.tables.layout import BENCHMARKS, DATA, interval, intervals, markdown


def gate_usage_table() -> str:
    """The usage that each way of setting a threshold reaches, from `data/gate_usage.csv` (notebook 05)."""
    table = pd.read_csv(DATA / "gate_usage.csv")
    table["threshold"] = table["gate"].str.rsplit(" ", n=1).str[0]
    table["aim"] = table["target"].map("aimed at {:g}%".format)
    table["shown"] = intervals(table, "usage", 1)
    wide = table.pivot(index="threshold", columns="aim", values="shown")
    order = table.sort_values("target")["aim"].unique()
    return markdown(wide.loc[table["threshold"].unique(), order].reset_index())


def gate_speed_table() -> str:
    """Speed-ups of the gate with intervals, from `data/gate_speed.csv` (notebook 05)."""
    table = pd.read_csv(DATA / "gate_speed.csv")
    table = table[table["of"].str.startswith("speedup vs ")]
    against = table["of"].str.removeprefix("speedup vs ")
    return markdown(pd.DataFrame({"gated generation against": against, "speed-up": intervals(table, "value", 2)}))


def gate_gains_table() -> str:
    """What each signal gains over a random gate of the same usage, from `data/gate_gains.csv` (notebook 05)."""
    table = pd.read_csv(DATA / "gate_gains.csv").query("of == 'fidelity'")
    return markdown(
        pd.DataFrame({
            "signal": table["signal"],
            "fidelity over random at 20% usage": intervals(table, "gain", 3, sign=True),
            "over all usages (area)": intervals(table, "area", 3, sign=True),
        })
    )  # fmt: skip


def gate_fidelity_table() -> str:
    """What each signal gains over a random gate at 20% usage, from `data/gate_fidelity_gains.csv`."""
    table = pd.read_csv(DATA / "gate_fidelity_gains.csv").set_index("signal")
    titles = {
        "fidelity": ("fidelity", 3),
        "shared_prefix": ("tokens before the first that differs", 1),
        "rougeL": ("ROUGE-L to the human continuation", 4),
    }
    columns = {
        title: intervals(table[table["of"] == of], "gain", digits, sign=True) for of, (title, digits) in titles.items()
    }
    columns = pd.DataFrame(columns)
    of_fidelity = table[table["of"] == "fidelity"]
    beyond = intervals(of_fidelity, "over_entropy", 3, sign=True)
    beyond["entropy"] = ""
    columns.insert(1, "... minus entropy's gain", beyond)
    columns.insert(2, "share of the oracle's", of_fidelity["of_oracle"].map("{:.0%}".format))
    return markdown(columns.loc[[*table.index.unique().drop("oracle"), "oracle"]].reset_index())


def gate_benchmarks() -> dict[str, dict]:
    """The files of `python main.py gate-bench` by pair, the fastest pair first."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(BENCHMARKS.glob("gate_*.json"))]
    files.sort(key=lambda each: each["ms_per_token"]["gated"])
    return {each["settings"]["pair"]: each for each in files}


def gate_sizes_table() -> str:
    """Speed of the gate with models of several sizes, from `data/benchmarks/gate_*.json`."""
    rows = []
    for pair, result in gate_benchmarks().items():
        speed, weights = result["speed"], result["weights"]
        sizes = " + ".join(f"{weights[name] / 1e6:.2f} M" for name in ("small", "large"))
        name = f"{pair} ({sizes})" if pair == "embedded" else pair
        ms = [result["ms_per_token"][key] for key in ("small", "large", "gated")]
        rows.append({
            "pair": f"{name}, {result['settings']['prompts']} prompts",
            "threads": str(result["provenance"]["threads"]),
            "ms per token: small / large / gated": " / ".join(f"{n:,.0f}" if n >= 20 else f"{n:.2f}" for n in ms),
            "usage": f"{speed['usage']:.1%}",
            "speed-up": interval(speed, "speedup", 2),
            "ideal 1/(c + p)": f"{speed['ideal']:.2f}",
            "share of it": f"{speed['share']:.2f}",
            "once the prompt is counted": f"{speed['share_with_prompt']:.2f}",
            "4, 8 prompts at once": ", ".join(f"{ratio:.1f}x" for ratio in result.get("throughput", {}).values()),
        })  # fmt: skip
    return markdown(pd.DataFrame(rows))


def gate_parts_table() -> str:
    """Where a gated token's time goes, and in brackets where the ideal's would, from the same files."""
    columns = {}
    for pair, result in gate_benchmarks().items():
        parts = parts_against_ideal(result["speed"], result["parts"])
        columns[pair] = parts["gated"].map("{:.3f}".format) + parts["ideal"].map(" ({:.3f})".format)
    return markdown(pd.DataFrame(columns).rename_axis("in units of the large model's time per token").reset_index())
