"""Kernels and whole decode steps, ours against what people would use instead, with random weights and caches.

    python -m helpers.benchmark --what attention decode prefill embedded
    python main.py bench --quick

All methods of a case are measured in one process, in rounds whose order is drawn anew; a ratio is the median over
rounds of two times of the same round. Results go to `data/benchmarks/`, one JSON a machine and kind, with the time of
every round in it; a later run replaces what it measures again and leaves the rest. On a CPU the stock quantized
caches stop at 8,192 tokens unless `--methods` asks for them.
"""

import argparse
import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import torch
from tqdm.auto import tqdm

from helpers.attention import implementation_name
from helpers.benchmark_plots import benchmark_figure
from helpers.benchmark_results import (
    COLUMNS,
    CPU_BARS,
    CUDA_BARS,
    FOLDER,
    check_bars,
    load_benchmarks,
    paired_ratio,
    report,
    save_benchmarks,
)
from helpers.benchmark_runs import METHODS, AttentionRun, DecodeRun, Method, PrefillRun, copy_bandwidth
from helpers.files import ROOT, cpu_name, relative_to_root
from helpers.metrics import bootstrap_median
from helpers.models import choose_device, load_model
from helpers.plots import save_figure
from helpers.shapes import SHAPES, random_model, shape_config, weight_count

__all__ = ["SHAPES", "Case", "Settings", "interleave", "load_benchmarks", "main", "plan", "random_model", "run"]

KINDS = ("attention", "decode", "prefill", "embedded")
SWEEP_BYTES = 2**28  # plain keys and values of the layers that an attention sweep goes through
LONG, LONG_SWEEPS = 4096, 4  # from this context on a round has fewer sweeps
STOCK = ("quanto", "hqq")
STOCK_LIMIT = 8192  # tokens beyond which these take minutes a round on a CPU
ATTENTION_METHODS = ("dynamic", "static-cache", "sdpa", "2", "4", "8", "16", "mix", "learned", "reference")
DECODE_METHODS = ("dynamic", "static-cache", "2", "4", "8", "16", "mix", "learned", *STOCK)
CPU_DECODE_METHODS = ("dynamic", "static-cache", "4", "learned", *STOCK)
PROMPT_METHODS = ("dynamic", "4", "learned")


@dataclass(frozen=True)
class Settings:
    """What is measured; an empty tuple leaves the choice to the device (see `plan`)."""

    kinds: tuple[str, ...] = KINDS
    shapes: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    rounds: int = 5
    seed: int = 0
    quick: bool = False

    def __post_init__(self):
        for name, known in (("kinds", KINDS), ("shapes", SHAPES), ("methods", METHODS)):
            if unknown := [value for value in getattr(self, name) if value not in known]:
                raise ValueError(f"{name} must be of {', '.join(known)}; got {', '.join(unknown)}")
        for name in ("contexts", "batches"):
            if any(value < 1 for value in getattr(self, name)):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be 1 or more, got {self.rounds}")


@dataclass(frozen=True)
class Case:
    """One comparison: a kind, a shape and a size, and the keys of the methods that take part."""

    kind: str
    shape: str
    context: int
    batch: int
    methods: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.kind}, {self.shape}, {self.context:,} tokens x {self.batch}"


def plan(settings: Settings, device: torch.device) -> list[Case]:
    """The cases of a run. Without choices: on a CPU what its bars need, on CUDA shapes, contexts and batches of all."""
    cuda = device.type == "cuda"
    large = ("SmolLM-360M", "SmolLM-1.7B", "Llama-2-7B")
    models = tuple(SHAPES) if cuda else ("SmolLM-135M",)
    batches = (1, 8) if cuda else (1,)
    defaults = {
        "attention": (
            large if cuda else ("SmolLM-360M",),
            (512, 4096, 32768) if cuda else (128, 512, 4096, 32768),
            batches,
            ATTENTION_METHODS,
        ),
        "decode": (
            models,
            (512, 1024, 4096, 32768) if cuda else (512, 4096, 16384),
            batches,
            DECODE_METHODS if cuda else CPU_DECODE_METHODS,
        ),
        "prefill": (models, (2048,), (1,), PROMPT_METHODS),
    }
    cases = []
    for kind in settings.kinds:
        allowed = [key for key in METHODS if key not in (STOCK if kind == "attention" else ("sdpa", "reference"))]
        if kind == "embedded":
            methods = tuple(key for key in settings.methods or PROMPT_METHODS if key in allowed)
            cases.append(Case(kind, "large", 256, 1, methods))
            continue
        shapes, contexts, batches, methods = defaults[kind]
        if settings.quick:
            shapes, contexts = shapes[:1], contexts[:2]
        methods = [key for key in settings.methods or methods if key in allowed]
        for shape in settings.shapes or shapes:
            for batch in settings.batches or batches:
                for context in (() if kind == "prefill" else settings.contexts) or contexts:
                    slow = () if cuda or settings.methods or context <= STOCK_LIMIT else STOCK
                    cases.append(Case(kind, shape, context, batch, tuple(k for k in methods if k not in slow)))
    return cases


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
    together = len(methods) * _plain_bytes(case, dtype) < _free_memory(device) / 2
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


def _plain_bytes(case: Case, dtype: torch.dtype) -> int:
    """Bytes of the full-precision cache of a case, of the layers that are there."""
    if case.kind == "embedded":
        return 0
    config = shape_config(case.shape)
    each = 2 * case.batch * case.context * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return each * (_layers(case, dtype) if case.kind == "attention" else config.num_hidden_layers)


def _layers(case: Case, dtype: torch.dtype) -> int:
    """Layers that an attention sweep goes through: as many as fill `SWEEP_BYTES`, two at least."""
    config = shape_config(case.shape)
    each = 2 * case.batch * case.context * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return min(config.num_hidden_layers, max(2, SWEEP_BYTES // each))


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
        needed += 2 * _plain_bytes(case, dtype)
    free = _free_memory(device)
    return f"it needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > 0.9 * free else ""


def _opener(
    method: Method, case: Case, settings: Settings, model, device: torch.device, dtype: torch.dtype, keep: bool
) -> Callable[[], object]:
    seed = settings.seed
    if case.kind == "attention":
        layers, sweeps = _layers(case, dtype), LONG_SWEEPS if case.context >= LONG else 16
        config = shape_config(case.shape)
        return partial(AttentionRun, method, config, case.context, case.batch, device, dtype, layers, sweeps, seed)
    if case.kind == "prefill":
        return partial(PrefillRun, method, model, case.context, case.batch, seed)
    rounds = settings.rounds + 1 if keep else 1
    return partial(DecodeRun, method, model, case.context, case.batch, rounds, case.kind == "embedded", seed)


def _rows(
    case: Case,
    methods: Sequence[Method],
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


def run_command(options: argparse.Namespace) -> None:
    """Measure, print, compare with the bars, write."""
    best, dtype = choose_device()
    device = torch.device(options.device or best)
    dtype = dtype if device.type == best.type else torch.float32
    settings = Settings(
        tuple(options.what), tuple(options.shapes), tuple(options.contexts), tuple(options.batches),
        tuple(options.methods), options.rounds, options.seed, options.quick,
    )  # fmt: skip
    about = asdict(settings) | {"attention": implementation_name(device.type)}
    paths: list[Path] = []

    def save(table: pd.DataFrame, copy_gbs: float) -> None:
        if options.out != "-":
            paths[:] = save_benchmarks(table, copy_gbs, about, device_name(device), options.out or FOLDER)

    table, copy_gbs = run(settings, device, dtype, save=save)
    print(report(table, check_bars(table, CUDA_BARS if device.type == "cuda" else CPU_BARS), copy_gbs))
    for path in paths:
        print(f"-> {relative_to_root(path)}")
    if options.figure:
        folder = FOLDER if options.out in (None, "-") else options.out
        measured = load_benchmarks(folder)
        figure = benchmark_figure(measured[measured["device"] == device_name(device)])
        print(f"-> {relative_to_root(save_figure(figure, ROOT / 'figures', '04_kernels'))}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", choices=KINDS, default=KINDS, help="default: all")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=(), help="default: by device")
    parser.add_argument("--contexts", nargs="+", type=int, default=(), help="tokens in the cache; default: by device")
    parser.add_argument("--batches", nargs="+", type=int, default=(), help="default: 1 on CPU, 1 and 8 on CUDA")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), default=(), help="default: by kind")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one shape and two contexts a kind")
    parser.add_argument("--device", help="default: the first accelerator, else the CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help=f"folder; default: {relative_to_root(FOLDER)}; - for none")
    parser.add_argument("--figure", action="store_true", help="draw figures/04_kernels.png of what --out holds")
    options = parser.parse_args(arguments)
    try:
        run_command(options)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
