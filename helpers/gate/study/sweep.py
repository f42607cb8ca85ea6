"""One signal against another: gates at several usages, and how far their curves lie above the random control's."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.bootstrap import bootstrap_groups
from helpers.gate.correction import measure_usage
from helpers.gate.gate import EntropyGate
from helpers.gate.signals import SIGNALS
from helpers.gate.study.evaluation import GATED, evaluate_gate
from helpers.gate.study.summaries import summarise_gates
from helpers.gate.text import LARGE, SMALL


def threshold_on_gated_text(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    signal: str,
    usage: float,
    max_new_tokens: int = 50,
    passes: int = 2,
    **settings,
) -> EntropyGate:
    """The gate at the percentile 100 (1 - usage) of the signal on the text that the gate itself writes.

    Begins with the small model's text and repeats with the gated one, `passes` times in all.
    """
    gate = EntropyGate(-np.inf if usage == 1 else np.inf, signal)
    for _ in range(passes if 0 < usage < 1 else 0):
        _, signals = measure_usage(small, large, tokenizer, prompts, gate, max_new_tokens, **settings)
        threshold = float(np.quantile(signals, 1 - usage))
        gate = EntropyGate(max(0.0, threshold) if signal == "oracle" else threshold, signal)
    return gate


def sweep_gates(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    signals: Sequence[str],
    usages: Sequence[float],
    max_new_tokens: int = 50,
    **settings,
) -> dict[str, EntropyGate]:
    """A gate for each signal and usage, by the name "signal usage".

    Thresholds are percentiles of the signal on gated text of `prompts` (see `threshold_on_gated_text`), so that usage
    elsewhere is near the target but not it; the oracle cannot fire more often than the models differ.
    """
    gates = {}
    for signal in signals:
        for usage in usages:
            if signal == "random" and 0 < usage < 1:
                gate = EntropyGate(1 - usage, signal)
            else:
                gate = threshold_on_gated_text(
                    small, large, tokenizer, prompts, signal, usage, max_new_tokens, **settings
                )
            gates[f"{signal} {usage:g}"] = gate
    return gates


def sweep(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    references: list[str],
    signals: Sequence[str] = SIGNALS,
    usages: Sequence[float] = (0.0, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0),
    max_new_tokens: int = 50,
    tuning_prompts: list[str] | None = None,
    **settings,
) -> pd.DataFrame:
    """Quality and speed of each signal at each usage: one row a threshold, as `summarise_gates` and `target_usage`.

    The gates are those of `sweep_gates`; all of them and the two models alone take turns. `settings` are those of
    `gated_generate`, as far as `evaluate_gate` takes them.
    """
    gates = sweep_gates(small, large, tokenizer, tuning_prompts or prompts, signals, usages, max_new_tokens, **settings)
    table = evaluate_gate(
        small, large, tokenizer, prompts, references, gates, max_new_tokens, methods=(GATED, LARGE, SMALL), **settings
    )
    summary = summarise_gates(table, gates)
    summary.insert(1, "target_usage", [usage for _ in signals for usage in usages])
    return summary


def gains_over_random(
    table: pd.DataFrame,
    gates: dict[str, EntropyGate],
    of: str = "fidelity",
    at: float = 0.2,
    resamples: int = 1000,
    groups: np.ndarray | None = None,
) -> pd.DataFrame:
    """How far each signal's curve of `of` over usage lies above the random one's, paired over the same prompts.

    Curves run straight from the small model alone (usage 0) over the gates to the large one alone (usage 1); a signal
    with another rollback is another curve, and gates that differ in their seed only are averaged into one point.
    `gain` is the distance at usage `at`, `area` the mean distance over all usages; both with 95% bootstrap intervals
    over prompts, or over whole `groups` `[prompts]` of them, in the order of their numbers.
    """
    wide = table.assign(written=table["usage"] * table["tokens"]).pivot(index="prompt", columns="method")
    groups = np.arange(len(wide)) if groups is None else groups
    grid = np.linspace(0, 1, 101)
    arrays = {method: wide.xs(method, axis=1, level=1)[[of, "written", "tokens"]].to_numpy(float)
              for method in (*gates, SMALL, LARGE)}  # fmt: skip
    curves: dict[str, dict[float, list[np.ndarray]]] = {}
    for name, gate in gates.items():
        points = curves.setdefault(_curve_name(gate), {})
        points.setdefault(gate.threshold, []).append(arrays[name])

    def curve(name: str, rows: np.ndarray) -> np.ndarray:
        points = [(0.0, arrays[SMALL][rows, 0].mean()), (1.0, arrays[LARGE][rows, 0].mean())]
        for same in curves[name].values():
            quality, written, tokens = np.mean([array[rows].mean(axis=0) for array in same], axis=0)
            points.append((written / tokens, quality))
        return np.interp(grid, *zip(*sorted(points), strict=True))

    result = []
    for name in curves:
        if name == "random":
            continue
        row: dict[str, object] = {"signal": name}
        for key, pick in (("gain", lambda d: float(np.interp(at, grid, d))), ("area", lambda d: float(d.mean()))):
            found = bootstrap_groups(
                lambda rows, pick=pick, name=name: pick(curve(name, rows) - curve("random", rows)), groups, resamples
            )
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), found, strict=True))
        result.append(row)
    order = [signal for signal in SIGNALS if signal != "random"]
    return pd.DataFrame(sorted(result, key=lambda row: order.index(row["signal"].split(",")[0]))).set_index("signal")


def _curve_name(gate: EntropyGate) -> str:
    return gate.signal if gate.rollback is None else f"{gate.signal}, rollback {gate.rollback:g}"
