"""What was asked of the bytes of the packed cache, and what was measured: over the table of `memory.memory_table`."""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from helpers.evaluation.memory import EMBEDDED
from helpers.evaluation.methods import PackedMethod, StockQuantized
from helpers.policies import FixedBits

STATIC = PackedMethod(FixedBits(4)).name
LEARNED, TOKENS, FIXED = "learned at settle", "rule", ("static", "learned at settle")  # groups
TWO_LAYERS = 1.05  # at most this much of live bytes and two layers in full precision


@dataclass(frozen=True)
class MemoryTarget:
    """`ratio` of the rows it speaks of (NaN elsewhere) is at most `limit`; of packed caches, batch 1."""

    text: str
    limit: float
    ratio: Callable[[pd.DataFrame], pd.Series]
    strict: bool = False  # less than the limit


def _held_over_live(groups: tuple[str, ...], least: int) -> Callable[[pd.DataFrame], pd.Series]:
    def ratio(table: pd.DataFrame) -> pd.Series:
        return (table["held_bytes"] / table["live_bytes"]).where(
            table["group"].isin(groups) & (table["tokens"] >= least)
        )

    return ratio


def _of(column: str, method: str, table: pd.DataFrame) -> pd.Series:
    """`column` over that of `method` at the same shape and length; NaN where that was not measured."""
    other = table[table["method"] == method].set_index(["shape", "tokens"])[column]
    keys = pd.MultiIndex.from_frame(table[["shape", "tokens"]])
    return table[column] / other.reindex(keys).to_numpy()


def _quality(table: pd.DataFrame) -> pd.Series:
    return table["method"].str.startswith("4-2 ") & (table["group"] == LEARNED)


def _learned_held(least: int) -> Callable[[pd.DataFrame], pd.Series]:
    return lambda table: _of("held_bytes", STATIC, table).where(_quality(table) & (table["tokens"] >= least))


def _two_layers(table: pd.DataFrame) -> pd.Series:
    ratio = table["peak_bytes"] / (table["live_bytes"] + 2 * table["layer_bytes"])
    return ratio.where(table["group"].isin(FIXED) & (table["tokens"] == 4096))


def _tokens_peak(table: pd.DataFrame) -> pd.Series:
    return table["peak_share"].where(
        (table["group"] == TOKENS) & (table["tokens"] == 4096) & (table["shape"] != EMBEDDED)
    )


def _against(backend: str, tokens: int) -> MemoryTarget:
    name = StockQuantized(backend).name

    def ratio(table: pd.DataFrame) -> pd.Series:
        ours = ((table["method"] == STATIC) | _quality(table)) & (table["tokens"] == tokens)
        return _of("peak_bytes", name, table).where(ours)

    return MemoryTarget(f"peak, {tokens:,} tokens: static 4-bit and learned 4-2 over {name}", 1.0, ratio, strict=True)


MEMORY_TARGETS = (
    MemoryTarget("held over live from 512 tokens on, fixed widths and schedules", 1.06, _held_over_live(FIXED, 512)),
    MemoryTarget("held over live from 256 tokens on, fixed widths and schedules", 1.12, _held_over_live(FIXED, 256)),
    MemoryTarget("held over live from 512 tokens on, widths token by token", 1.12, _held_over_live((TOKENS,), 512)),
    MemoryTarget("held over live from 256 tokens on, widths token by token", 1.25, _held_over_live((TOKENS,), 256)),
    MemoryTarget("held, learned 4-2 over static 4-bit, at every length", 1.0, _learned_held(0), strict=True),
    MemoryTarget("held, learned 4-2 over static 4-bit, from 4,096 tokens on", 0.80, _learned_held(4096)),
    MemoryTarget(
        "peak, 4,096 tokens, fixed widths and schedules, over live bytes and two layers in full precision",
        TWO_LAYERS, _two_layers,
    ),
    MemoryTarget("peak, 4,096 tokens, 30 layers, widths token by token, over full precision", 0.36, _tokens_peak),
    *(_against(backend, tokens) for backend in ("quanto", "hqq") for tokens in (512, 4096, 16384)),
)  # fmt: skip


def check_memory_targets(table: pd.DataFrame) -> pd.DataFrame:
    """Each of `MEMORY_TARGETS` against the rows of one sequence in `table`: a row each.

    Columns `target`, `limit`, `measured` (the worst case), `where` (shape, tokens and method of it) and `result`:
    "met", "missed" or "not measured".
    """
    table, rows = table[table["batch"] == 1].reset_index(drop=True), []
    for target in MEMORY_TARGETS:
        values = target.ratio(table).astype(float).dropna()
        row = {"target": target.text, "limit": target.limit, "measured": float("nan"), "where": ""}
        if values.empty:
            rows.append({**row, "result": "not measured"})
            continue
        worst = table.loc[values.idxmax()]
        met = values.max() < target.limit if target.strict else values.max() <= target.limit
        row |= {"measured": values.max(), "where": f"{worst['shape']}, {worst['tokens']:,} tokens, {worst['method']}"}
        rows.append({**row, "result": "met" if met else "missed"})
    return pd.DataFrame(rows)


def memory_targets_text(targets: pd.DataFrame) -> str:
    """What `check_memory_targets` made of it, a line a target."""
    lines = []
    for row in targets.to_dict("records"):
        found = "" if row["result"] == "not measured" else f"; measured at most {row['measured']:.3f} ({row['where']})"
        lines.append(f"{row['result']}: {row['target']}, at most {row['limit']:g}{found}")
    return "\n".join(lines)
