"""Kernels and whole decode steps, ours against what people would use instead, with random weights and caches.

    python -m helpers.benchmark --what attention decode prefill embedded
    python main.py bench --quick

All methods of a case are measured in one process, in rounds whose order is drawn anew; a ratio is the median over
rounds of two times of the same round. Results go to `data/benchmarks/`, one JSON a machine and kind, with the time of
every round in it; a later run replaces what it measures again and leaves the rest. On a CPU the stock quantized
caches stop at 8,192 tokens unless `--methods` asks for them.
"""

import gc
import random
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from helpers.evaluation.benchmark.cases import LONG, LONG_SWEEPS, Case, Settings, plain_bytes, plan, sweep_layers
from helpers.evaluation.benchmark.methods import METHODS, BenchmarkMethod
from helpers.evaluation.benchmark.results import COLUMNS, paired_ratio
from helpers.evaluation.benchmark.runs import AttentionRun, DecodeRun, PrefillRun
from helpers.evaluation.benchmark.timing import copy_bandwidth
from helpers.evaluation.bootstrap import bootstrap_median
from helpers.io.paths import ROOT
from helpers.io.provenance import cpu_name
from helpers.models.loading import load_model
from helpers.models.shapes import random_model, shape_config, weight_count


def interleave(
    openers: dict[str, Callable[[], object]],
    rounds: int,
    keep: bool,
    seed: int,
    tick: Callable[[], object],
    foreign: Sequence[str] = (),
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], dict[str, str]]:
    """Measure several runs in turn: per name the ms of each round, its facts, and for those that failed the reason.

    One warm-up round, then `rounds`, each in an order of its own, so that slow moments hit all alike. With `keep` the
    runs stay open between rounds, else only one is in memory at a time. A run that finds no memory is left out and
    the others go on; so is one of the names `foreign`, whose code is not ours, whatever it fails of.
    """
    order, shuffle = list(openers), random.Random(seed)
    runs: dict[str, object] = {}
    times: dict[str, list[float]] = {name: [] for name in order}
    facts: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for turn in range(rounds + 1):
        for name in order:
            tick()
            if name in failed:
                continue
            try:
                run = runs.pop(name, None) or openers[name]()
                ms = run.measure()
                if turn:
                    times[name].append(ms)
                facts[name] = run.facts()
                if keep:
                    runs[name] = run
            except Exception as error:
                if name not in foreign and not _out_of_memory(error):
                    raise
                failed[name] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            run = None
            if name in failed or not keep:
                release_memory()
        shuffle.shuffle(order)
    return {name: ms for name, ms in times.items() if name not in failed}, facts, failed


def _out_of_memory(error: Exception) -> bool:
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(k in str(error).lower() for k in known)


def release_memory() -> None:
    """Give back what closed runs held, so that the next one finds it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
        torch.cuda.set_device(device)  # events are recorded on the current device
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
                shortage = _shortage(case, model, device, dtype)
                if shortage:
                    tqdm.write(f"{case}: left out, {shortage}")
                    bar.update(len(case.methods) * (_rounds(case, settings) + 1))
                    continue
                if model is None:
                    model = _load(case, settings.seed, device, dtype)
                rows += _measure(case, settings, model, device, dtype, copy_gbs, bar)
                save(pd.DataFrame(rows, columns=COLUMNS), copy_gbs)
                release_memory()
    return pd.DataFrame(rows, columns=COLUMNS), copy_gbs


def _measure(
    case: Case, settings: Settings, model, device: torch.device, dtype: torch.dtype, copy_gbs: float, bar: tqdm
) -> list[dict[str, object]]:
    methods = [method for method in (METHODS[key]() for key in case.methods) if method.installed]
    rounds = _rounds(case, settings)
    bar.update((len(case.methods) - len(methods)) * (rounds + 1))
    together = len(methods) * plain_bytes(case, dtype) < _free_memory(device) / 2
    keep = case.kind != "embedded" and together  # the short text of the embedded model would soon be a longer one
    openers = {m.name: _opener(m, case, settings, model, device, dtype, keep) for m in methods}
    foreign = [m.name for m in methods if m.group == "stock"]
    times, facts, failed = interleave(openers, rounds, keep, settings.seed, lambda: bar.update(1), foreign)
    for name, reason in failed.items():
        tqdm.write(f"{case}: {name} left out, {reason}")
    return _rows(case, methods, str(dtype).removeprefix("torch."), times, facts, failed, copy_gbs)


def _rounds(case: Case, settings: Settings) -> int:
    """Rounds of a case: more where they are short, fewer where they are long."""
    return {"embedded": 3 * settings.rounds, "prefill": -(-settings.rounds // 2)}.get(case.kind, settings.rounds)


def _load(case: Case, seed: int, device: torch.device, dtype: torch.dtype):
    """The model of a case; attention needs none."""
    if case.kind == "attention":
        return None
    if case.kind == "embedded":
        return load_model(ROOT / "data" / "models" / case.shape, device, dtype, quiet=True)[0]
    return random_model(case.shape, seed, device, dtype)


def _free_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _shortage(case: Case, model, device: torch.device, dtype: torch.dtype) -> str:
    """Why a case cannot run, or nothing. On CUDA a cache that is too large fails by itself, and only that method."""
    if case.kind == "embedded":
        return ""
    needed = 0
    if model is None and case.kind != "attention":
        needed = weight_count(shape_config(case.shape)) * dtype.itemsize
    if device.type != "cuda":
        needed += 2 * plain_bytes(case, dtype)
    free = _free_memory(device)
    return f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > 0.9 * free else ""


def _opener(
    method: BenchmarkMethod, case: Case, settings: Settings, model, device: torch.device, dtype: torch.dtype, keep: bool
) -> Callable[[], object]:
    seed = settings.seed
    if case.kind == "attention":
        layers, sweeps = sweep_layers(case, dtype), LONG_SWEEPS if case.context >= LONG else 16
        config = shape_config(case.shape)
        return partial(AttentionRun, method, config, case.context, case.batch, device, dtype, layers, sweeps, seed)
    if case.kind == "prefill":
        return partial(PrefillRun, method, model, case.context, case.batch, seed)
    rounds = settings.rounds + 1 if keep else 1
    return partial(DecodeRun, method, model, case.context, case.batch, rounds, case.kind == "embedded", seed)


def _rows(
    case: Case,
    methods: Sequence[BenchmarkMethod],
    dtype: str,
    times: dict[str, list[float]],
    facts: dict[str, dict[str, float]],
    failed: dict[str, str],
    copy_gbs: float,
) -> list[dict[str, object]]:
    """A row a method: medians and ratios to DynamicCache with intervals over rounds, and the facts."""
    rows = []
    base = times.get("DynamicCache")
    for method in methods:
        row = {name: float("nan") for name in COLUMNS}
        row |= {"kind": case.kind, "shape": case.shape, "method": method.name, "group": method.group, "dtype": dtype,
                "context": case.context, "batch": case.batch, "round_ms": [], "error": ""}  # fmt: skip
        if method.name in failed:
            rows.append({**row, "error": failed[method.name]})
            continue
        ms = times[method.name]
        row |= dict(zip(("ms", "ms_low", "ms_high"), bootstrap_median(ms), strict=True))
        row |= {"round_ms": [round(value, 5) for value in ms]} | facts[method.name]
        if base:
            row |= dict(zip(("ratio", "ratio_low", "ratio_high"), paired_ratio(ms, base), strict=True))
        if not np.isnan(row["read_bytes"]):
            row["bandwidth_gbs"] = row["read_bytes"] / row["ms"] / 1e6
            row["copy_share"] = row["bandwidth_gbs"] / copy_gbs
        rows.append(row)
    return rows


def device_name(device: torch.device) -> str:
    """What the machine calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
