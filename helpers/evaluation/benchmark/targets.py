"""Targets set before the kernels were written, and what was measured against them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers.evaluation.benchmark.results import paired_ratio

QUANTITIES = {
    "speed-up": "times as fast as",
    "time": "of the time of",
    "peak memory": "of the peak memory of",
    "bandwidth": "of the bandwidth of a copy",
}


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
        """The target in words."""
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
    *(
        Target("decode", "SmolLM-135M", context, 1.03, against="static 4-bit", method="static 4-bit, balanced keys")
        for context in (512, 4096, 16384)
    ),
    Target("prefill", "SmolLM-135M", 2048, 1.1),
    Target("prefill", "SmolLM-135M", 2048, 1.2, method="learned 8-4-2"),
)


CUDA_TARGETS = (
    Target("attention", "SmolLM-1.7B", 32768, 2.5, "speed-up", "SDPA alone", batch=8),
    Target("attention", "SmolLM-1.7B", 32768, 0.6, "bandwidth", batch=8),
    Target("decode", "SmolLM-1.7B", 1024, 1.05),
    Target("decode", "SmolLM-1.7B", 32768, 1.5, "speed-up", batch=8),
    Target("decode", "SmolLM-1.7B", 32768, 0.35, "peak memory", batch=8),
)


def check_targets(table: pd.DataFrame, targets: Sequence[Target]) -> pd.DataFrame:
    """Each of `targets` against one machine's measurements (columns `COLUMNS`).

    Columns `target`, `limit`, `measured` with `low` and `high` where the quantity is a time, and `result`: "met",
    "missed" or "not measured".
    """
    rows = []
    for target in targets:
        measured, low, high = _measure(table, target)
        result = "not measured"
        if not np.isnan(measured):
            met = measured >= target.limit if target.at_least else measured <= target.limit
            result = "met" if met else "missed"
        row = {"target": target.text, "limit": target.limit, "measured": measured, "low": low, "high": high}
        rows.append({**row, "result": result})
    return pd.DataFrame(rows)


def _measure(table: pd.DataFrame, target: Target) -> tuple[float, float, float]:
    """What was measured, with its interval where there is one; NaN where nothing was."""
    nan = float("nan")
    of_case = [table[name] == getattr(target, name) for name in ("kind", "shape", "context", "batch")]
    case = table[np.logical_and.reduce([*of_case, table["ms"].notna()])]
    case = case.drop_duplicates("method", keep="last").set_index("method")
    needed = {target.method} if target.quantity == "bandwidth" else {target.method, target.against}
    if not needed <= set(case.index):
        return nan, nan, nan
    ours = case.loc[target.method]
    if target.quantity == "bandwidth":
        return float(ours["copy_share"]), nan, nan
    other = case.loc[target.against]
    if target.quantity == "peak memory":
        return float(ours["peak_bytes"] / other["peak_bytes"]), nan, nan
    times = (other, ours) if target.quantity == "speed-up" else (ours, other)
    return paired_ratio(*(each["round_ms"] for each in times))
