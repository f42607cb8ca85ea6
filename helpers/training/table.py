"""The training table of Part 1: its columns, how it is checked and read, and its summary. `collection` writes it."""

from pathlib import Path

import numpy as np
import pandas as pd

from helpers.cache import WIDTHS

ASSIGNMENT_COLUMNS = ["entropy", "rarity", "attn_var", "kv_bits", "latency", "accuracy"]
COLUMNS = [*ASSIGNMENT_COLUMNS, "confidence", "text_id", "position", "token_id"]


def check_training_data(table: pd.DataFrame) -> None:
    """Raise `ValueError`, naming column and fault, unless `table` is a sound result of `collect`."""
    first = list(table.columns[: len(ASSIGNMENT_COLUMNS)])
    if first != ASSIGNMENT_COLUMNS:
        raise ValueError(f"the first columns must be {ASSIGNMENT_COLUMNS}, got {first}")
    if twice := sorted(table.columns[table.columns.duplicated()]):
        raise ValueError(f"column(s) there more than once: {', '.join(twice)}")
    if missing := [name for name in COLUMNS if name not in table.columns]:
        raise ValueError(f"missing column(s): {', '.join(missing)}")
    if table.empty:
        raise ValueError("the table has no rows")
    for name in COLUMNS:
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise ValueError(f"column {name} is not numeric")
        if not np.isfinite(table[name]).all():
            raise ValueError(f"column {name} holds NaN or infinity")
    ranges = {"entropy": (0, 20), "rarity": (0, 30), "attn_var": (0, 0.25), "accuracy": (0, 1), "confidence": (0, 1)}
    for name, (low, high) in ranges.items():
        if not table[name].between(low, high).all():
            raise ValueError(f"column {name} must lie between {low} and {high}")
    if not table["kv_bits"].isin(WIDTHS).all():
        raise ValueError(f"column kv_bits must hold only {WIDTHS}, got {sorted(table['kv_bits'].unique())}")
    if not (table["latency"] > 0).all():
        raise ValueError("column latency must be positive")


def read_training_data(path: str | Path) -> pd.DataFrame:
    """Read and check a table that `collect` wrote; a missing file is answered with the notebook that writes it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path.name} is not there yet: run notebook 01_data_collection.ipynb first")
    try:
        table = pd.read_csv(path)
        check_training_data(table)
    except ValueError as error:  # pandas' own errors are such, too
        raise ValueError(f"{path.name}: {error}") from error
    return table


def summarise(table: pd.DataFrame) -> str:
    """The assignment's summary as text: head(10), means, std/min/max and correlations of its six columns."""
    asked = table[ASSIGNMENT_COLUMNS]
    parts = [
        asked.head(10).to_string(),
        "=== Overall Summary (mean) ===\n" + asked.mean().to_string(),
        "=== Distribution Stats (std, min, max) ===\n" + asked.describe().loc[["std", "min", "max"]].to_string(),
        "=== Feature Correlations ===\n" + asked.corr().to_string(),
    ]
    return "\n\n".join(parts)
