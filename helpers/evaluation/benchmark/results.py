"""Results of the benchmark: their files, the table of ratios, and the report."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from helpers.evaluation.bootstrap import bootstrap_median
from helpers.io import ROOT, provenance, relative_to_root, write_json

FOLDER = ROOT / "data" / "benchmarks"

# `ms` is the median over rounds of the time of one token's attention in one layer, of one decode step, or of a prompt;
# `ratio` is to DynamicCache's time of the same round.
COLUMNS = ["kind", "shape", "method", "group", "dtype", "context", "batch", "ms", "ms_low", "ms_high", "ratio",
           "ratio_low", "ratio_high", "round_ms", "stored_bytes", "live_bytes", "peak_bytes", "read_bytes",
           "code_bits", "bandwidth_gbs", "copy_share", "error"]  # fmt: skip

# Methods in the table of ratios, and their titles there.
RATIO_COLUMNS = {
    "static 4-bit": "4-bit",
    "static 4-bit, balanced keys": "4-bit, balanced keys",
    "learned 8-4-2": "8-4-2, learned",
    "StaticCache": "StaticCache",
    "stock quanto 4-bit": "quanto 4-bit",
    "stock hqq 4-bit": "HQQ 4-bit",
}


def paired_ratio(times: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median over rounds of the ratio of two methods' times in the same round, with its 95% bootstrap interval."""
    return bootstrap_median(np.divide(times, base))


def device_slug(device: str) -> str:
    """A device's name as part of a file name: lower case, letters and digits joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")


def save_benchmarks(
    table: pd.DataFrame, copy_gbs: float, settings: dict[str, object], device: str, folder: str | Path = FOLDER
) -> list[Path]:
    """Add the rows to one JSON a kind in `folder`, named for the machine `device`; returns the paths.

    A file holds runs, each with its settings, copy bandwidth (GB/s), provenance and rows. What a new run measured
    again disappears from the older ones.
    """
    about = provenance(copy_gbs=round(copy_gbs, 3), settings=settings) | {"device": device}
    paths = []
    for kind, part in table.groupby("kind", sort=False):
        rows = [
            {name: int(value) if name.endswith("_bytes") else value for name, value in row.items() if _known(value)}
            for row in part.to_dict("records")
        ]
        paths.append(Path(folder) / f"{device_slug(device)}-{kind}.json")
        measured = {_case(row) for row in rows}
        older = json.loads(paths[-1].read_text(encoding="utf-8"))["runs"] if paths[-1].is_file() else []
        runs = [{**run, "rows": [row for row in run["rows"] if _case(row) not in measured]} for run in older]
        write_json(paths[-1], {"device": device, "runs": [*(r for r in runs if r["rows"]), {**about, "rows": rows}]})
    return paths


def _case(row: dict[str, object]) -> tuple[object, ...]:
    return tuple(row[name] for name in ("shape", "method", "context", "batch", "dtype"))


def _known(value: object) -> bool:
    return not (isinstance(value, float) and np.isnan(value))


def load_benchmarks(folder: str | Path = FOLDER) -> pd.DataFrame:
    """All measurements in `folder` as one table: `COLUMNS` and `device`, `threads`, `date`, `copy_gbs`.

    Raises `FileNotFoundError` where there are none.
    """
    parts = []
    for path in sorted(Path(folder).glob("*.json")):
        for run in json.loads(path.read_text(encoding="utf-8")).get("runs", ()):  # none in the gate's files
            part = pd.DataFrame(run["rows"]).reindex(columns=COLUMNS)
            parts.append(part.assign(**{name: run[name] for name in ("device", "threads", "date", "copy_gbs")}))
    if not parts:
        raise FileNotFoundError(f"no benchmark in {relative_to_root(folder)}: run python main.py bench first")
    return pd.concat(parts, ignore_index=True)


def ratio_table(table: pd.DataFrame) -> pd.DataFrame:
    """One machine's measurements as text, a row a case: times over DynamicCache's with intervals, and shares of bytes.

    `held bytes (live)` are those of the 4-bit and of the learned cache over what DynamicCache holds.
    Cells of methods that a case lacks are empty.
    """
    measured = table[table["ms"].notna()].sort_values(["kind", "shape", "batch", "context"], kind="stable")
    rows: dict[str, dict[str, str]] = {}
    for (kind, shape, batch, context), case in measured.groupby(["kind", "shape", "batch", "context"], sort=False):
        case = case.drop_duplicates("method", keep="last").set_index("method")
        if "DynamicCache" not in case.index:
            continue
        base = case.loc["DynamicCache"]
        row = {"DynamicCache, ms": f"{base['ms']:.3g}"}
        for method, title in RATIO_COLUMNS.items():
            known = method in case.index and not np.isnan(case.loc[method, "ratio"])
            row[title] = "{ratio:.2f} [{ratio_low:.2f}, {ratio_high:.2f}]".format(**case.loc[method]) if known else ""
        shares = []
        for method in ("static 4-bit", "learned 8-4-2"):
            if method in case.index and base["live_bytes"] > 0 and case.loc[method, "live_bytes"] > 0:
                held, live = (case.loc[method, name] / base[name] for name in ("stored_bytes", "live_bytes"))
                shares.append(f"{held:.2f} ({live:.2f})")
        row["held bytes (live)"] = ", ".join(shares)
        rows[f"{kind}, {shape}, {context:,} tokens" + (f" x {batch}" if batch > 1 else "")] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("what")


def describe_machine(table: pd.DataFrame) -> str:
    """Machine, threads, numbers, copy bandwidth and rounds of one machine's measurements in a line."""
    rounds = sorted({len(times) for times in table["round_ms"] if isinstance(times, list) and times})
    threads = " or ".join(str(number) for number in sorted(table["threads"].unique()))
    parts = [f"{table['device'].iloc[0]}", f"{threads} thread{'' if threads == '1' else 's'}"]
    parts += [" or ".join(sorted(table["dtype"].unique())), f"copies {table['copy_gbs'].median():.0f} GB/s"]
    return ", ".join([*parts, f"medians of {' or '.join(map(str, rounds))} interleaved rounds"])


def benchmark_report(table: pd.DataFrame, targets: pd.DataFrame, copy_gbs: float) -> str:
    """The table, and what `check_targets` made of it, as text."""
    shown = ["method", "ms", "ratio", "ratio_low", "ratio_high", "code_bits", "bandwidth_gbs", "copy_share"]
    parts = [f"copy bandwidth {copy_gbs:.1f} GB/s, read and written"]
    for (kind, shape, batch, context), part in table.groupby(["kind", "shape", "batch", "context"], sort=False):
        parts.append(f"{kind}, {shape}, batch {batch}, {context:,} tokens; ms, and ratio to DynamicCache")
        columns = [name for name in shown if part[name].notna().any()]
        if kind != "attention":
            columns += [name for name in ("peak_bytes", "stored_bytes", "live_bytes") if part[name].notna().any()]
        parts.append(part[columns].round(4).to_string(index=False))
    for row in targets[targets["result"] != "not measured"].to_dict("records"):
        interval = "" if np.isnan(row["low"]) else f" ({row['low']:.2f} to {row['high']:.2f})"
        parts.append(f"{row['result']}: {row['measured']:.2f}{interval}; {row['target']}")
    return "\n".join(parts)
