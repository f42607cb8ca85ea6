"""Measuring: the cases of a run, and the methods of a case in turn.

All methods of a case are measured in one process, in rounds whose order is drawn anew; a ratio is the median over
rounds of two times of the same round. On a CPU the stock quantized caches stop at 8,192 tokens unless they are asked
for by name.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.evaluation.benchmark.cases import LONG, LONG_SWEEPS, Case, Settings, plain_bytes, plan, sweep_layers
from helpers.evaluation.benchmark.methods import METHODS, BenchmarkMethod
from helpers.evaluation.benchmark.results import COLUMNS, paired_ratio
from helpers.evaluation.benchmark.runs import BLOCK, AttentionRun, DecodeRun, PrefillRun
from helpers.evaluation.bootstrap import bootstrap_median
from helpers.evaluation.device import copy_bandwidth, free_memory, release_memory
from helpers.evaluation.methods import StockQuantized
from helpers.io.paths import ROOT
from helpers.models.loading import load_model
from helpers.models.shapes import random_model, shape_config, weight_count


@dataclass
class Measured:
    """What `interleave` found, by name: ms of each round, further facts, and the reason of those that failed."""

    times: dict[str, list[float]]
    facts: dict[str, dict[str, float]]
    failed: dict[str, str]


def interleave(
    openers: dict[str, Callable[[], object]],
    rounds: int,
    keep: bool,
    seed: int,
    tick: Callable[[], object],
    foreign: Sequence[str] = (),
) -> Measured:
    """Measure several runs in turn: a warm-up round, then `rounds`, each in an order of its own.

    So slow moments hit all alike. With `keep` the runs stay open between rounds, else only one is in memory at a
    time; `tick` is called at each turn. A run that finds no memory is left out, and the others go on. Any other error
    is raised, unless the run is among `foreign`: code of others, which is then left out too.
    """
    order, shuffle = list(openers), random.Random(seed)
    runs: dict[str, object] = {}
    found = Measured({name: [] for name in order}, {}, {})
    for turn in range(rounds + 1):
        for name in order:
            tick()
            if name in found.failed:
                continue
            try:
                run = runs.pop(name, None) or openers[name]()
                ms = run.measure()
                if turn:
                    found.times[name].append(ms)
                found.facts[name] = run.facts()
                if keep:
                    runs[name] = run
            except Exception as error:
                if name not in foreign and not _out_of_memory(error):
                    raise
                found.failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
                del found.times[name]
            run = None
            if name in found.failed or not keep:
                release_memory()
        shuffle.shuffle(order)
    return found


def _out_of_memory(error: Exception) -> bool:
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(k in str(error).lower() for k in known)


def run(
    settings: Settings,
    device: torch.device,
    dtype: torch.dtype,
    progress: bool = True,
    save: Callable[[pd.DataFrame, float], object] = lambda table, copy_gbs: None,
) -> tuple[pd.DataFrame, float]:
    """Measure all cases; returns the table (columns `COLUMNS`, a row a method and case) and the copy bandwidth in GB/s.

    Models and caches that do not fit the free memory are left out with a line. `save` is called with the same two
    after every case, so that a run that is cut off has not been in vain.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    release_memory()
    copy_gbs = copy_bandwidth(device, 1024 if device.type == "cuda" else 256) / 1e9
    cases = plan(settings, device)
    rows: list[dict[str, object]] = []
    total = sum(len(case.methods) * (_rounds(case, settings) + 1) for case in cases)
    with tqdm(total=total, desc="benchmark", disable=not progress, leave=False) as bar:
        for _, group in groupby(cases, key=lambda case: (case.kind == "attention", case.shape)):
            model = None
            for case in group:
                bar.set_postfix_str(str(case))
                if shortage := _shortage(case, model, device, dtype):
                    tqdm.write(f"{case}: left out, {shortage}")
                    bar.update(len(case.methods) * (_rounds(case, settings) + 1))
                    continue
                model = model or _load(case, settings.seed, device, dtype)
                rows += _measure(case, settings, model, device, dtype, copy_gbs, bar)
                save(pd.DataFrame(rows, columns=COLUMNS), copy_gbs)
                release_memory()
    return pd.DataFrame(rows, columns=COLUMNS), copy_gbs


def _measure(
    case: Case,
    settings: Settings,
    model: PreTrainedModel | None,
    device: torch.device,
    dtype: torch.dtype,
    copy_gbs: float,
    bar: tqdm,
) -> list[dict[str, object]]:
    """The rows of one case: what was measured of each method that is installed."""
    methods = [method for method in (METHODS[key]() for key in case.methods) if method.installed]
    rounds = _rounds(case, settings)
    bar.update((len(case.methods) - len(methods)) * (rounds + 1))
    together = len(methods) * plain_bytes(case, dtype) < free_memory(device) / 2
    keep = case.kind != "embedded" and together  # the short text of the embedded model would soon be a longer one

    def open_run(method: BenchmarkMethod):
        if case.kind == "attention":
            layers, sweeps = sweep_layers(case, dtype), LONG_SWEEPS if case.context >= LONG else BLOCK
            sizes = (shape_config(case.shape), case.context, case.batch, device, dtype, layers, sweeps)
            return AttentionRun(method, *sizes, settings.seed)
        if case.kind == "prefill":
            return PrefillRun(method, model, case.context, case.batch, settings.seed)
        rounds_open = settings.rounds + 1 if keep else 1
        return DecodeRun(method, model, case.context, case.batch, rounds_open, case.kind == "embedded", settings.seed)

    openers = {method.name: lambda method=method: open_run(method) for method in methods}
    foreign = [method.name for method in methods if isinstance(method.method, StockQuantized)]
    found = interleave(openers, rounds, keep, settings.seed, lambda: bar.update(1), foreign)
    for name, reason in found.failed.items():
        tqdm.write(f"{case}: {name} left out, {reason}")
    about = {"kind": case.kind, "shape": case.shape, "context": case.context, "batch": case.batch}
    about["dtype"] = str(dtype).removeprefix("torch.")
    return [{**about, **_row(method, found, copy_gbs)} for method in methods]


def _rounds(case: Case, settings: Settings) -> int:
    """Rounds of a case: more where they are short, fewer where they are long."""
    return {"embedded": 3 * settings.rounds, "prefill": -(-settings.rounds // 2)}.get(case.kind, settings.rounds)


def _load(case: Case, seed: int, device: torch.device, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model of a case; attention needs none."""
    if case.kind == "attention":
        return None
    if case.kind == "embedded":
        return load_model(ROOT / "data" / "models" / case.shape, device, dtype, quiet=True)[0]
    return random_model(case.shape, seed, device, dtype)


def _shortage(case: Case, model: PreTrainedModel | None, device: torch.device, dtype: torch.dtype) -> str:
    """Why a case cannot run, or nothing. On CUDA a cache that is too large fails by itself, and only that method."""
    if case.kind == "embedded":
        return ""
    needed = 0
    if model is None and case.kind != "attention":
        needed = weight_count(shape_config(case.shape)) * dtype.itemsize
    if device.type != "cuda":
        needed += 2 * plain_bytes(case, dtype)
    free = free_memory(device)
    return f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > 0.9 * free else ""


def _row(method: BenchmarkMethod, found: Measured, copy_gbs: float) -> dict[str, object]:
    """A method's medians and ratios to DynamicCache with intervals over rounds, and the facts."""
    row = {"method": method.name, "group": method.group, "round_ms": [], "error": found.failed.get(method.name, "")}
    if method.name in found.failed:
        return row
    ms = found.times[method.name]
    row |= dict(zip(("ms", "ms_low", "ms_high"), bootstrap_median(ms), strict=True))
    row |= {"round_ms": [round(value, 5) for value in ms]} | found.facts[method.name]
    if base := found.times.get("DynamicCache"):
        row |= dict(zip(("ratio", "ratio_low", "ratio_high"), paired_ratio(ms, base), strict=True))
    if "read_bytes" in row:
        row["bandwidth_gbs"] = row["read_bytes"] / row["ms"] / 1e6
        row["copy_share"] = row["bandwidth_gbs"] / copy_gbs
    return row
