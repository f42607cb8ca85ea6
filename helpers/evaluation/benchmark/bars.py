"""Targets set before the kernels were written, and what was measured against them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers.evaluation.benchmark.results import QUANTITIES, paired_ratio


@dataclass(frozen=True)
class Target:
    """`quantity` of `method` at one case, compared with `against`: at most `limit`, or for the others at least."""

    kind: str  # "attention", "decode", "prefill" or "embedded"
    shape: str
    context: int
    limit: float
    quantity: str = "time"
    against: str = "DynamicCache"
    method: str = "static 4-bit"
    batch: int = 1

    @property
    def at_least(self) -> bool:
        return self.quantity in ("speed-up", "bandwidth")

    @property
    def text(self) -> str:
        """The bar in words."""
        other = "" if self.quantity == "bandwidth" else f" {self.against}"
        rows = f", batch {self.batch}" if self.batch > 1 else ""
        return (
            f"{self.kind}, {self.shape}, {self.context:,} tokens{rows}: {self.method} "
            f"{'at least' if self.at_least else 'at most'} {self.limit:g} {QUANTITIES[self.quantity]}{other}"
        )


CPU_TARGETS = (
    *(Target("attention", "SmolLM-360M", context, 1.4, "speed-up") for context in (128, 512, 4096)),
    Target("attention", "SmolLM-360M", 32768, 4.0, "speed-up"),
    Target("decode", "SmolLM-135M", 512, 1.05),
    Target("decode", "SmolLM-135M", 4096, 1.0),
    Target("decode", "SmolLM-135M", 16384, 0.75),
    Target("decode", "SmolLM-135M", 4096, 0.65, against="stock quanto 4-bit"),
    Target("decode", "SmolLM-135M", 4096, 0.65, against="stock hqq 4-bit"),
    Target("embedded", "large", 256, 1.15, method="learned 8-4-2"),
    Target("prefill", "SmolLM-135M", 2048, 1.3),
)


CUDA_TARGETS = (
    Target("attention", "SmolLM-1.7B", 32768, 2.5, "speed-up", "SDPA alone", batch=8),
    Target("attention", "SmolLM-1.7B", 32768, 0.6, "bandwidth", batch=8),
    Target("decode", "SmolLM-1.7B", 1024, 1.05),
    Target("decode", "SmolLM-1.7B", 32768, 1.5, "speed-up", batch=8),
    Target("decode", "SmolLM-1.7B", 32768, 0.35, "peak memory", batch=8),
)


def check_targets(table: pd.DataFrame, bars: Sequence[Target]) -> pd.DataFrame:
    """Each of `bars` against one machine's measurements (columns `COLUMNS`).

    Columns `bar`, `limit`, `measured` with `low` and `high` where the quantity is a time, and `result`: "met",
    "missed" or "not measured".
    """
    rows = []
    for bar in bars:
        measured, low, high = _measure(table, bar)
        result = "not measured"
        if not np.isnan(measured):
            result = "met" if (measured >= bar.limit if bar.at_least else measured <= bar.limit) else "missed"
        row = {"bar": bar.text, "limit": bar.limit, "measured": measured, "low": low, "high": high}
        rows.append({**row, "result": result})
    return pd.DataFrame(rows)


def _measure(table: pd.DataFrame, bar: Target) -> tuple[float, float, float]:
    nothing = (float("nan"),) * 3
    if table.empty:
        return nothing
    case = table[
        (table["kind"] == bar.kind)
        & (table["shape"] == bar.shape)
        & (table["context"] == bar.context)
        & (table["batch"] == bar.batch)
        & table["ms"].notna()
    ]
    case = case.drop_duplicates("method", keep="last").set_index("method")
    needed = {bar.method} if bar.quantity == "bandwidth" else {bar.method, bar.against}
    if not needed <= set(case.index):
        return nothing
    if bar.quantity == "bandwidth":
        return float(case.loc[bar.method, "copy_share"]), float("nan"), float("nan")
    if bar.quantity == "peak memory":
        share = case.loc[bar.method, "peak_bytes"] / case.loc[bar.against, "peak_bytes"]
        return float(share), float("nan"), float("nan")
    ours, theirs = (case.loc[name, "round_ms"] for name in (bar.method, bar.against))
    return paired_ratio(theirs, ours) if bar.quantity == "speed-up" else paired_ratio(ours, theirs)
