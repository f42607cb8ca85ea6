"""Part 4: every way to store the cache, on the same texts: accuracy, KL, multiple choice, latency and memory.

    python main.py compare --preset P --model M --texts T

Quality is measured block by block on packed texts (what decoding token by token would give), multiple choice through
the committed context, latency in interleaved rounds of decoding.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.controller import SCHEDULES, LearnedController
from helpers.corpora import MultipleChoice
from helpers.files import atomic_path, provenance, write_json
from helpers.generation import decode, synchronise
from helpers.kv_cache import PackedKVCache
from helpers.metrics import bootstrap_mean, bootstrap_median
from helpers.multiple_choice import score_items
from helpers.policies import AgeSchedule, EntropyRule, FixedBits, RandomBits, Step, describe_schedule
from helpers.processes import is_main_process
from helpers.quality import measure_store
from helpers.stores import AnyStore, FullPrecision, Store, code_bits, live_bytes, stock_stores, stored_bytes


def default_stores(controllers: str | Path) -> dict[str, list[AnyStore]]:
    """Group of each store -> stores, the controllers read from the folder `controllers`.

    Random controls that match the histogram of another policy are added by `compare`, which measures it.
    """
    simple = [AgeSchedule(4, (Step(3, 2),)), AgeSchedule(8, (Step(3, 4), Step(6, 2)))]
    ranked = [
        AgeSchedule(commit, steps, ranking)
        for commit, steps in SCHEDULES
        for ranking in ("random", "attention", "attention x error")
    ]
    return {
        "full precision": [FullPrecision()],
        "static": [Store(FixedBits(bits), quantizer=q) for bits in (8, 4, 2) for q in ("rotated", "minmax")],
        "rule": [Store(EntropyRule())],
        "schedule": [Store(policy) for policy in (*simple, *ranked)],
        "learned at commit": [
            Store(LearnedController.load(controllers, "seed")),
            Store(LearnedController.load(controllers, "commit", average=4.0)),
        ],
        "learned at settle": [
            Store(LearnedController.load(controllers, "settle", commit, steps)) for commit, steps in SCHEDULES
        ],
        "stock": list(stock_stores()),
    }


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
    groups: dict[str, list[AnyStore]],
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
            measured = measure_store(model, sequences, store, first, batch)
            if group in ("rule", "learned at commit") and not isinstance(store.policy, RandomBits):
                queue.insert(0, Store(RandomBits(measured["widths"], name=f"random as {store.name}")))
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


def time_decoding(
    model: PreTrainedModel,
    ids: torch.Tensor,
    stores: Sequence[AnyStore],
    rounds: int = 3,
    prompt: int = 256,
    steps: int = 48,
    seed: int = 0,
) -> pd.DataFrame:
    """Time per decoded token of each store after a prompt of `prompt` tokens: `ids` `[tokens]` are read step by step.

    Columns `method`, `latency_ms` (median) with `latency_low`, `latency_high` (95% interval over rounds of the
    median), `latency_ratio` (to the first store, median of the ratios within a round) and `cuda_peak_bytes`. One
    warm-up round; the order of the stores is drawn anew in each round, so that slow moments hit all alike.
    """
    order = list(range(len(stores)))
    times: list[list[list[float]]] = [[] for _ in stores]
    peaks = [0] * len(stores)
    shuffle = random.Random(seed)
    ids = ids[: prompt + steps]
    for turn in tqdm(range(rounds + 1), desc="latency", leave=False):
        for number in order:
            cache, driver = stores[number].open(model)
            if model.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.no_grad():
                logits = model(input_ids=ids[None, :prompt], cache=cache).logits
                if driver is not None:
                    driver.observe(ids[None, :prompt], logits)
            result = decode(model, ids[None, prompt:], cache, driver, forced=True)
            if model.device.type == "cuda":
                peaks[number] = max(peaks[number], torch.cuda.max_memory_allocated())
            if turn:
                times[number].append(result.latency_ms)
        shuffle.shuffle(order)
    rows = []
    base = [float(np.mean(turn)) for turn in times[0]]
    for store, turns, peak in zip(stores, times, peaks, strict=True):
        median, low, high = bootstrap_median(np.concatenate(turns))
        ratio = float(np.median([np.mean(turn) / b for turn, b in zip(turns, base, strict=True)]))
        row = {"method": store.name, "latency_ms": median, "latency_low": low, "latency_high": high}
        # A median leaves out the steps that commit a block; the ratio is of means, which count them.
        rows.append({**row, "latency_ratio": ratio, "cuda_peak_bytes": peak})
    return pd.DataFrame(rows)


@torch.no_grad()
def against_length(
    model: PreTrainedModel, stores: Sequence[AnyStore], lengths: Sequence[int], steps: int = 16, seed: int = 0
) -> pd.DataFrame:
    """Memory and latency after contexts of the given lengths, of random tokens: one row a store and length.

    Columns `method`, `tokens`, `live_bytes`, `stored_bytes`, `code_bits`, `latency_ms` (mean step, commits included).
    What is predicted is meaningless beyond the model's own context; bytes and times are not.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (1, max(lengths) + steps), generator=generator).to(model.device)
    rows = []
    for length in tqdm(lengths, desc="lengths", leave=False):
        for turn in range(2):  # the first is a warm-up
            for store in stores:
                cache, driver = store.open(model)
                logits = model(input_ids=ids[:, :length], cache=cache).logits
                if driver is not None:
                    driver.observe(ids[:, :length], logits)
                sizes = {"live_bytes": live_bytes(cache), "stored_bytes": stored_bytes(cache)}
                sizes["code_bits"] = code_bits(cache)
                result = decode(model, ids[:, length : length + steps], cache, driver, forced=True)
                if turn:
                    latency = float(np.mean(result.latency_ms))
                    rows.append({"method": store.name, "tokens": length, **sizes, "latency_ms": latency})
    return pd.DataFrame(rows)


@torch.no_grad()
def controller_share(
    model: PreTrainedModel, ids: torch.Tensor, store: AnyStore, prompt: int = 256, steps: int = 64, rounds: int = 3
) -> dict[str, float]:
    """What the policy costs in decoding: ms per token in the model and in the driver, and the driver's `share`.

    The driver's time is everything but the forward: features, networks, commit and settle. Medians over `rounds` of
    means over `steps` tokens (whole blocks), after one round of warm-up.
    """
    forward, driving = [], []
    for turn in range(rounds + 1):
        cache, driver = store.open(model)
        logits = model(input_ids=ids[None, :prompt], cache=cache).logits
        driver.observe(ids[None, :prompt], logits)
        spent = np.zeros((steps, 2))
        for step in range(steps):
            token = ids[None, prompt + step : prompt + step + 1]
            started = time.perf_counter()
            logits = model(input_ids=token, cache=cache).logits
            synchronise(ids.device)
            read = time.perf_counter()
            driver.observe(token, logits)
            synchronise(ids.device)
            spent[step] = read - started, time.perf_counter() - read
        if turn:
            forward.append(1000 * spent[:, 0].mean())
            driving.append(1000 * spent[:, 1].mean())
    model_ms, driver_ms = float(np.median(forward)), float(np.median(driving))
    return {
        "method": store.name,
        "model_ms": model_ms,
        "driver_ms": driver_ms,
        "share": driver_ms / (model_ms + driver_ms),
    }


@torch.no_grad()
def follow_text(model: PreTrainedModel, ids: torch.Tensor, stores: dict[str, list[AnyStore]]) -> pd.DataFrame:
    """Read `ids` `[tokens]` block by block: after each block, bytes held and the width of every token so far.

    `stores`: group -> stores. Columns `method`, `group`, `tokens`, `live_bytes`, `stored_bytes`, `bits` (a list).
    """
    rows = []
    for group, members in stores.items():
        for store in members:
            cache, driver = store.open(model)
            for at in range(0, len(ids), store.block):
                part = ids[None, at : at + store.block]
                logits = model(input_ids=part, cache=cache).logits
                if driver is not None:
                    driver.observe(part, logits)
                packed = isinstance(cache, PackedKVCache)
                bits = cache.token_bits()[0].tolist() if packed else [16.0] * (at + part.shape[1])
                sizes = {"live_bytes": live_bytes(cache), "stored_bytes": stored_bytes(cache)}
                rows.append({"method": store.name, "group": group, "tokens": len(bits), **sizes, "bits": bits})
    return pd.DataFrame(rows)


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
