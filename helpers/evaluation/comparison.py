"""Part 4: every way to store the cache, on the same texts: accuracy, KL, multiple choice, latency and memory.

Quality is measured block by block on packed texts (what decoding token by token would give), and with it `held_bytes`;
multiple choice through the committed context; latency in interleaved rounds of decoding; `peak_bytes` in deployment, a
prompt in one forward and then tokens one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.bootstrap import bootstrap_mean, interval_columns
from helpers.evaluation.latency import time_decoding
from helpers.evaluation.memory import DECODED, deployment_peak
from helpers.evaluation.methods import FullPrecision, Group, Method, PackedMethod
from helpers.evaluation.multiple_choice import score_items
from helpers.evaluation.quality import measure_method, quality_row
from helpers.io import write_table
from helpers.io.processes import is_main_process
from helpers.models import MultipleChoice
from helpers.policies import FixedBits, LearnedSchedule, RandomBits, Schedule

STATIC = PackedMethod(FixedBits(4))  # what the learned schedules are held against


@dataclass
class Comparison:
    """`table` has a row a method; `texts` and `items` what each method did on each sequence and each item."""

    table: pd.DataFrame
    texts: pd.DataFrame  # columns method, sequence, kl, accuracy
    items: pd.DataFrame  # columns method, item, acc, acc_norm
    pairs: list[tuple[str, str]]  # methods whose difference the text speaks of

    def paired(self, method: str, other: str, column: str = "kl") -> dict[str, float | str]:
        """Mean difference `method - other` with its 95% bootstrap interval over sequences (or items)."""
        source, unit = (self.items, "item") if column in self.items else (self.texts, "sequence")
        values = source.pivot(index=unit, columns="method", values=column)
        for name in (method, other):
            if name not in values:
                raise ValueError(f"no method {name!r}; there are {list(values)}")
        mean, low, high = bootstrap_mean((values[method] - values[other]).to_numpy())
        return {"method": method, "against": other, "of": column, "difference": mean, "low": low, "high": high}


def compare_methods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: torch.Tensor,
    items: Sequence[MultipleChoice],
    groups: Sequence[Group],
    first: int = 256,
    rounds: int = 3,
    batch: int = 25,
) -> Comparison:
    """Measure all methods of `groups` on `sequences` `[count, tokens]` (positions from `first` on) and `items`.

    `rounds` of timed decoding, interleaved; 0 leaves latency out. `peak_bytes` is of the first sequence: its first
    `first` tokens as a prompt, then 64 decoded. Raises `ValueError` where sequences have no token beyond `first`.
    """
    if not 0 < first < sequences.shape[1]:
        raise ValueError(f"first must lie within the sequences of {sequences.shape[1]} tokens, got {first}")
    rows, methods, controls = [], [], []
    of_texts: dict[str, dict[str, np.ndarray]] = {}  # method -> measure -> value of each sequence
    of_items: dict[str, dict[str, np.ndarray]] = {}
    references: dict[int, torch.Tensor] = {}

    def measure(method: Method, group: Group) -> tuple[float, ...]:
        """Add a row, and return the shares of the widths that the method chose."""
        measured = measure_method(model, sequences, method, first, batch, references)
        row = {"method": method.name, "group": group.name, "peak_bytes": float("nan"), **quality_row(measured)}
        of_texts[method.name] = {name: measured[name] for name in ("kl", "accuracy")}
        if items and group.chooses_endings:
            scores = score_items(model, tokenizer, items, method)
            of_items[method.name] = {name: scores[name].to_numpy() for name in ("acc", "acc_norm")}
            for name, values in of_items[method.name].items():
                row |= interval_columns(name, values)
        rows.append(row)
        methods.append(method)
        return measured["widths"]

    for group in groups:
        for method in group.methods:
            widths = measure(method, group)
            if group.random_control:
                control = PackedMethod(RandomBits(widths, name=f"random as {method.name}"))
                measure(control, group)
                controls.append((method.name, control.name))
    for name, results in (("accuracy", of_texts), ("acc", of_items), ("acc_norm", of_items)):
        full = results.get(FullPrecision.name)
        for row in rows:
            if full and row["method"] in results:
                row |= interval_columns(f"{name}_change", results[row["method"]][name] - full[name])
    table = pd.DataFrame(rows)
    if is_main_process():
        table["peak_bytes"] = [deployment_peak(model, sequences[:1], method, first, DECODED) for method in methods]
    if rounds and is_main_process():
        table = table.merge(time_decoding(model, sequences[0], methods, rounds, first), on="method")
    pairs = [
        *_schedule_pairs(methods),
        *_coding_pairs(methods),
        *controls,
        (STATIC.name, PackedMethod(STATIC.policy, quantizer="minmax").name),
    ]
    return Comparison(table, _long(of_texts, "sequence"), _long(of_items, "item"), pairs)


def _long(results: dict[str, dict[str, np.ndarray]], unit: str) -> pd.DataFrame:
    """A row a method and unit (sequence or item), a column a measure."""
    parts = [pd.DataFrame({"method": method, **values}).rename_axis(unit) for method, values in results.items()]
    return pd.concat(parts).reset_index() if parts else pd.DataFrame()


def _schedule_pairs(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """Each learned schedule against those that move blocks in the same way, static 4-bit and full precision."""
    policies = {m.name: m.policy for m in methods if isinstance(m, PackedMethod) and isinstance(m.policy, Schedule)}
    pairs = []
    for name, policy in policies.items():
        if isinstance(policy, LearnedSchedule):
            rivals = [n for n, other in policies.items() if other.movement == policy.movement and n != name]
            pairs += [(name, rival) for rival in (*rivals, STATIC.name, FullPrecision.name)]
    return pairs


def _coding_pairs(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """Each policy with the usual coding of keys against the same policy without parts of it."""
    packed = [m for m in methods if isinstance(m, PackedMethod) and m.quantizer == "rotated"]
    return [(PackedMethod(m.policy, m.block).name, m.name) for m in packed if m.coding]


def standard_pairs(comparison: Comparison) -> pd.DataFrame:
    """Paired differences that the text speaks of: learned policies against controls, peers and baselines."""
    rows = []
    for method, other in comparison.pairs:
        if not {method, other} <= set(comparison.table["method"]):
            continue
        chose = len(comparison.items) and {method, other} <= set(comparison.items["method"])
        for column in ("kl", "accuracy", *(("acc",) if chose else ())):
            if (column, other) != ("kl", FullPrecision.name):  # that difference is the KL itself
                rows.append(comparison.paired(method, other, column))
    return pd.DataFrame(rows)


def save_comparison(comparison: Comparison, folder: str | Path, name: str, about: dict[str, object]) -> None:
    """Write `name`.csv, `name`_pairs.csv and `name`.json (`about` and provenance) into `folder`."""
    write_table(Path(folder) / f"{name}.csv", comparison.table, about)
    write_table(Path(folder) / f"{name}_pairs.csv", standard_pairs(comparison))
