"""The table of `python main.py memory`: peak, held and live bytes of every kind of cache, and the targets."""

from pathlib import Path

import pandas as pd

from helpers.evaluation.memory_targets import check_memory_targets
from helpers.publishing.tables.layout import DATA, markdown

MISSING = "*Not measured yet: `python main.py memory` writes the file that this table is made of.*"


def memory_table(folder: Path = DATA) -> str:
    """Each cache over the lengths of `memory.csv`, as shares of full precision, a table a shape; then the targets."""
    path = folder / "memory.csv"
    if not path.is_file():
        return MISSING
    table = pd.read_csv(path)
    shares = [table[f"{name}_share"].map("{:.2f}".format) for name in ("peak", "held", "live")]
    table["shown"] = shares[0] + " / " + shares[1] + " (" + shares[2] + ")"
    rows = " x " + table["batch"].astype(str)
    table["case"] = table["tokens"].map("{:,}".format) + rows.where(table["batch"] > 1, "")
    parts = []
    for shape, part in table.groupby("shape", sort=False):
        order = part.sort_values(["batch", "tokens"])["case"].unique()
        wide = part.pivot(index="method", columns="case", values="shown").loc[part["method"].unique(), order]
        parts.append(f"{shape}, peak / held (live) after a prompt of so many tokens (x rows):")
        parts.append(markdown(wide.fillna("").rename_axis("cache").reset_index()))
    targets = check_memory_targets(table).query("result != 'not measured'")
    lines = [f"Targets, {(targets['result'] == 'met').sum()} of {len(targets)} met, each by its worst case:", ""]
    for row in targets.to_dict("records"):
        lines.append(
            f"* {row['result']}: {row['target']}: at most {row['limit']:g}; {row['measured']:.2f} ({row['where']})"
        )
    return "\n\n".join([*parts, "\n".join(lines)])


def memory_rows(folder: Path = DATA) -> list[tuple[str, str, str]]:
    """Peak and held bytes after 4,096 tokens at the shape of a real model, for the headline; none without them."""
    path = folder / "memory.csv"
    if not path.is_file():
        return []
    table = pd.read_csv(path).query("shape == 'SmolLM-135M' and tokens == 4096 and batch == 1").set_index("method")
    if table.empty:
        return []
    static = table.loc["static 4-bit"]
    learned = table[table["group"] == "learned at settle"].iloc[0]
    rows = []
    for name, row in (("static 4-bit", static), ("learned 4-2", learned)):
        what = f"{name}: peak bytes (held while decoding) after a prompt of 4,096 tokens, over full precision's"
        peak = row["peak_bytes"] / table.loc["full precision", "peak_bytes"]
        rows.append((f"{what} (SmolLM-135M shape)", f"{peak:.2f} ({row['held_share']:.2f})", "`main.py memory`"))
    return rows
