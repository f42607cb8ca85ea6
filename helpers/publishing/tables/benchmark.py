"""The tables of `python main.py bench`: times and bytes against the library's caches, machine by machine."""

from pathlib import Path

from helpers.evaluation.benchmark import (
    CPU_TARGETS,
    CUDA_TARGETS,
    check_targets,
    describe_machine,
    load_benchmarks,
    ratio_table,
)
from helpers.publishing.tables.layout import BENCHMARKS, interval, markdown


def benchmark_table(folder: Path = BENCHMARKS) -> str:
    """Attention and decode steps against the library's caches, and the targets, for each machine of `folder`."""
    try:
        measured = load_benchmarks(folder)
    except FileNotFoundError:
        return "*Not measured yet: `python main.py bench` writes the files that this table is made of.*"
    parts = []
    for device, table in measured.groupby("device"):
        ratios = ratio_table(table)
        ratios = ratios.loc[:, (ratios != "").any()].rename_axis("what").reset_index()
        parts.append(f"{describe_machine(table)}:\n\n{markdown(ratios)}")
        targets = check_targets(table, CPU_TARGETS if str(table["dtype"].iloc[0]) == "float32" else CUDA_TARGETS)
        targets = targets[targets["result"] != "not measured"]
        if targets.empty:
            continue
        met = (targets["result"] == "met").sum()
        lines = [f"Targets set beforehand, {met} of {len(targets)} met on {device}:", ""]
        for target in targets.to_dict("records"):
            shown = f"{target['measured']:.2f}"
            if target["low"] == target["low"]:  # times have an interval
                shown += f" [{target['low']:.2f}, {target['high']:.2f}]"
            lines.append(f"* {target['result']}: {target['target']}; measured {shown}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def decode_rows() -> list[tuple[str, str, str]]:
    """Time of a decode step over DynamicCache's at the longest context that was measured on a CPU; none without it."""
    try:
        table = load_benchmarks(BENCHMARKS)
    except FileNotFoundError:
        return []
    table = table[(table["kind"] == "decode") & (table["dtype"] == "float32") & table["ratio"].notna()]
    rows = []
    for method in ("static 4-bit", "learned 8-4-2"):
        for _, row in table[table["method"] == method].nlargest(1, "context").iterrows():
            what = f"{method}: time of a decode step after {row['context']:,} tokens, over `DynamicCache`'s"
            rows.append((f"{what} ({row['shape']} shape, CPU)", interval(row, "ratio", 2), "`main.py bench`"))
    return rows
