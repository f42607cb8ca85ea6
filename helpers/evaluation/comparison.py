"""Part 4: every way to store the cache, on the same texts: accuracy, KL, multiple choice, latency and memory.

    python main.py compare --preset P --model M --texts T

Quality is measured block by block on packed texts (what decoding token by token would give), multiple choice through
the committed context, latency in interleaved rounds of decoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.bootstrap import bootstrap_mean
from helpers.evaluation.latency import time_decoding
from helpers.evaluation.methods import FullPrecision, Method, PackedMethod
from helpers.evaluation.multiple_choice import score_items
from helpers.evaluation.quality import measure_method
from helpers.io.atomic import atomic_path
from helpers.io.processes import is_main_process
from helpers.io.provenance import provenance
from helpers.io.results import write_json
from helpers.models.items import MultipleChoice
from helpers.policies.rules import RandomBits
from helpers.policies.schedules import SCHEDULES, describe_schedule


@dataclass
class Comparison:
    """`table` has a row a method; `texts` and `items` what each method did on each sequence and each item."""

    table: pd.DataFrame
    texts: pd.DataFrame  # columns method, sequence, kl, accuracy
    items: pd.DataFrame  # columns method, item, acc, acc_norm

    def paired(self, method: str, other: str, column: str = "kl") -> dict[str, float | str]:
        """Mean difference `method - other` with its 95% bootstrap interval over sequences (or items)."""
        source, unit = (
            (self.items, "item") if column.startswith("acc_") or column == "acc" else (self.texts, "sequence")
        )
        values = source.pivot(index=unit, columns="method", values=column)
        for name in (method, other):
            if name not in values:
                raise ValueError(f"no method {name!r}; there are {list(values)}")
        mean, low, high = bootstrap_mean((values[method] - values[other]).to_numpy())
        return {"method": method, "against": other, "of": column, "difference": mean, "low": low, "high": high}


def compare(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: torch.Tensor,
    items: Sequence[MultipleChoice],
    groups: dict[str, list[Method]],
    first: int = 256,
    rounds: int = 3,
    batch: int = 25,
) -> Comparison:
    """Measure all stores of `groups` on `sequences` `[count, tokens]` (positions from `first` on) and `items`.

    `rounds` of timed decoding, interleaved; 0 leaves latency out. The hand-made schedules sit out the multiple choice:
    its contexts are a few blocks long, and hardly anything in them grows old enough to move. Policies that choose
    widths token by token are joined by a random control of the same histogram.
    """
    rows, texts, choices, stores = [], [], [], []
    for group, members in groups.items():
        queue = list(members)
        while queue:
            store = queue.pop(0)
            measured = measure_method(model, sequences, store, first, batch)
            if group in ("rule", "learned at commit") and not isinstance(store.policy, RandomBits):
                queue.insert(0, PackedMethod(RandomBits(measured["widths"], name=f"random as {store.name}")))
            rows.append({"method": store.name, "group": group, **_quality_row(measured)})
            part = {"method": store.name, "sequence": np.arange(len(sequences))}
            texts.append(pd.DataFrame({**part, "kl": measured["kl"], "accuracy": measured["accuracy"]}))
            if items and group != "schedule":
                scores = score_items(model, tokenizer, items, store)
                choices.append(scores.assign(method=store.name, item=np.arange(len(items))))
                for name in ("acc", "acc_norm"):
                    rows[-1][name], rows[-1][f"{name}_low"], rows[-1][f"{name}_high"] = bootstrap_mean(scores[name])
            stores.append(store)
    table = pd.DataFrame(rows)
    full = next((t for t in texts if t["method"].iloc[0] == FullPrecision.name), None)
    if full is not None:
        changes = [bootstrap_mean(part["accuracy"].to_numpy() - full["accuracy"].to_numpy()) for part in texts]
        for at, name in enumerate(("accuracy_change", "accuracy_change_low", "accuracy_change_high")):
            table[name] = [change[at] for change in changes]
    _add_choice_changes(table, choices)
    if rounds and is_main_process():
        table = table.merge(time_decoding(model, sequences[0], stores, rounds, first), on="method")
    columns = ["method", "item", "acc", "acc_norm"]
    return Comparison(
        table, pd.concat(texts, ignore_index=True), pd.concat(choices)[columns] if choices else pd.DataFrame()
    )


def _add_choice_changes(table: pd.DataFrame, choices: list[pd.DataFrame]) -> None:
    """Paired differences to full precision on the same items, for the methods that chose endings."""
    scores = {part["method"].iloc[0]: part for part in choices}
    if FullPrecision.name not in scores:
        return
    for name in ("acc", "acc_norm"):
        full = scores[FullPrecision.name][name].to_numpy()
        changes = {method: bootstrap_mean(part[name].to_numpy() - full) for method, part in scores.items()}
        for at, end in enumerate(("", "_low", "_high")):
            table[f"{name}_change{end}"] = table["method"].map({method: each[at] for method, each in changes.items()})


def _quality_row(measured: dict) -> dict[str, float]:
    kl, kl_low, kl_high = bootstrap_mean(measured["kl"])
    return {
        "code_bits": measured["code_bits"],
        "bits_per_element": measured["bits_per_element"],
        "live_bytes": measured["live_bytes"],
        "peak_bytes": measured["peak_bytes"],
        "accuracy": float(measured["accuracy"].mean()),
        "perplexity": float(np.exp(measured["loss"].mean())),
        "kl": kl,
        "kl_low": kl_low,
        "kl_high": kl_high,
    }


def standard_pairs(comparison: Comparison) -> pd.DataFrame:
    """Paired differences that the text speaks of: each learned policy against its controls, peers and the baselines."""
    names = list(comparison.table["method"])
    pairs = []
    for commit, steps in SCHEDULES:
        start = describe_schedule(commit, steps)
        learned = next((n for n in names if n.startswith(start) and n.endswith("learned score")), None)
        rivals = [n for n in names if n.startswith(start) and n != learned]
        pairs += [(learned, rival) for rival in [*rivals, "static 4-bit", "full precision"] if learned]
    for name in names:
        if name.startswith("random as "):
            pairs.append((name.removeprefix("random as "), name))
    pairs.append(("static 4-bit", "static 4-bit, plain min-max"))
    rows = []
    for method, other in pairs:
        if method not in names or other not in names:
            continue
        chose = len(comparison.items) and {method, other} <= set(comparison.items["method"])
        columns = ["kl", "accuracy", *(["acc"] if chose else [])]
        rows += [
            comparison.paired(method, other, column)
            for column in columns
            if (column, other) != ("kl", "full precision")
        ]
    return pd.DataFrame(rows)


def save_comparison(comparison: Comparison, folder: str | Path, name: str, about: dict[str, object]) -> None:
    """Write `name`.csv, `name`_pairs.csv and `name`.json (`about` and provenance) into `folder`."""
    for table, path in ((comparison.table, f"{name}.csv"), (standard_pairs(comparison), f"{name}_pairs.csv")):
        with atomic_path(Path(folder) / path) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
    write_json(Path(folder) / f"{name}.json", {**about, **provenance()})
