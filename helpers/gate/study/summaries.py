"""What `evaluate_gate` found, a row a method or gate, with intervals."""

import numpy as np
import pandas as pd

from helpers.evaluation import bootstrap_mean, bootstrap_ratio
from helpers.evaluation.rouge import ROUGE_TYPES
from helpers.gate.gate import EntropyGate
from helpers.gate.study.evaluation import GATED
from helpers.gate.text import LARGE, SMALL


def summarise_methods(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: mean `seconds`, `ms_per_token`, `tokens_per_second`, time to first token, ROUGE, fidelity."""
    groups = table.groupby("method", sort=False)
    summary = groups[["seconds", "first_token_seconds", *ROUGE_TYPES, "fidelity"]].mean()
    totals = groups[["seconds", "tokens"]].sum(min_count=1)  # NaN where nothing was timed
    summary.insert(1, "ms_per_token", 1000 * totals["seconds"] / totals["tokens"])
    summary.insert(2, "tokens_per_second", totals["tokens"] / totals["seconds"])
    return summary


def speed_against_ideal(table: pd.DataFrame, method: str = GATED) -> dict[str, float]:
    """What a gate gained in time per token, and what it could: `usage`, `cost_ratio`, `speedup`, `ideal`, `share`.

    Needs `method`, "large" and "small". `cost_ratio` c is the small model's time per token over the large
    one's, `usage` p the share of all tokens that the large one wrote, `ideal` is 1 / (c + p), `share` is the part of
    it that was reached.
    """
    ms = summarise_methods(table)["ms_per_token"]
    gated = table[table["method"] == method]
    usage = float(np.average(gated["usage"], weights=gated["tokens"]))
    cost_ratio, speedup = ms[SMALL] / ms[LARGE], ms[LARGE] / ms[method]
    ideal = 1 / (cost_ratio + usage)
    return {"usage": usage, "cost_ratio": cost_ratio, "speedup": speedup, "ideal": ideal, "share": speedup / ideal}


def paired_intervals(table: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Paired bootstrap over prompts, each (value, low, high) at 95%.

    Per method M: `speedup vs M`, ratio of mean times per token of M and the gate; against the large model
    `rougeL - large` and `fidelity`; and `usage`, the share of all tokens that the large model wrote.
    """
    wide = table.assign(per_token=table["seconds"] / table["tokens"]).pivot(index="prompt", columns="method")
    tokens = wide["tokens"][GATED]
    result = {
        f"speedup vs {method}": bootstrap_ratio(wide["per_token"][method], wide["per_token"][GATED])
        for method in table["method"].unique()
        if method != GATED
    }
    result["usage"] = bootstrap_ratio(wide["usage"][GATED] * tokens, tokens)
    result["fidelity"] = bootstrap_mean(wide["fidelity"][GATED])
    result["rougeL - large"] = bootstrap_mean(wide["rougeL"][GATED] - wide["rougeL"][LARGE])
    return result


def summarise_gates(table: pd.DataFrame, gates: dict[str, EntropyGate]) -> pd.DataFrame:
    """One row a gate of `evaluate_gate`: `signal, threshold, usage, fidelity`, ROUGE, `ms_per_token, speedup`, ideal.

    `usage`, `fidelity`, `rougeL` and `speedup` carry 95% bootstrap intervals over prompts (`_low`, `_high`). Gates
    whose `seconds` are NaN have no times.
    """
    ms, rows = summarise_methods(table)["ms_per_token"], []
    for name, gate in gates.items():
        own = table[table["method"].isin([name, LARGE])].replace({"method": {name: GATED}})
        gated = own[own["method"] == GATED]
        intervals = paired_intervals(own) | {"rougeL": bootstrap_mean(gated["rougeL"])}
        row = {"signal": gate.signal.name, "threshold": gate.threshold} | speed_against_ideal(table, name)
        row |= gated[["fidelity", *ROUGE_TYPES]].mean().to_dict()
        for of, key in (("usage", "usage"), ("speedup", f"speedup vs {LARGE}"), ("fidelity",) * 2, ("rougeL",) * 2):
            _, row[f"{of}_low"], row[f"{of}_high"] = intervals[key]
        rows.append(row | {"ms_per_token": ms[name]})
    return pd.DataFrame(rows, index=pd.Index(gates, name="gate"))
