"""Kernels and whole decode steps, ours against what people would use instead, with random weights and caches.

    python -m helpers.benchmark --what attention decode prefill embedded
    python main.py bench --quick

All methods of a case are measured in one process, in rounds whose order is drawn anew; a ratio is the median over
rounds of two times of the same round. Results go to `data/benchmarks/`, one JSON a machine and kind, with the time of
every round in it.
"""

import argparse
import gc
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from helpers.benchmark_bars import CPU_BARS, CUDA_BARS, check_bars, paired_ratio
from helpers.benchmark_cases import (
    METHODS,
    SHAPES,
    AttentionRun,
    DecodeRun,
    Method,
    PrefillRun,
    copy_bandwidth,
    random_model,
    shape_config,
    weight_count,
)
from helpers.files import ROOT, cpu_name, provenance, relative_to_root, write_json
from helpers.metrics import bootstrap_median
from helpers.models import choose_device, load_model

__all__ = ["METHODS", "SHAPES", "Settings", "load_benchmarks", "random_model", "run", "shape_config"]

KINDS = ("attention", "decode", "prefill", "embedded")
FOLDER = ROOT / "data" / "benchmarks"
COLUMNS = ["kind", "shape", "method", "group", "dtype", "context", "batch", "ms", "ms_low", "ms_high",
           "ratio", "ratio_low", "ratio_high", "round_ms", "stored_bytes", "live_bytes", "peak_bytes", "read_bytes", "code_bits",
           "bandwidth_gbs", "copy_share", "error"]  # fmt: skip
SWEEP_BYTES = 2**28  # plain keys and values of the layers that an attention sweep goes through
LONG, LONG_SWEEPS = 16384, 4  # from this context on a round has fewer sweeps
STOCK_LIMIT = 8192  # tokens from which the stock quantized caches take minutes a round on a CPU


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
    methods: tuple[str, ...] = field(default=())


ATTENTION_METHODS = ("dynamic", "static-cache", "sdpa", "2", "4", "8", "16", "mix", "learned", "reference")
DECODE_METHODS = ("dynamic", "static-cache", "2", "4", "8", "16", "mix", "learned", "quanto", "hqq")
CPU_DECODE_METHODS = ("dynamic", "static-cache", "4", "learned", "quanto", "hqq")
PREFILL_METHODS = ("dynamic", "4", "learned")
EMBEDDED_METHODS = ("dynamic", "4", "learned")


def plan(settings: Settings, device: torch.device) -> list[Case]:
    """The cases of a run. Without choices: on a CPU what the bars of a CPU need, on CUDA the whole grid."""
    cuda = device.type == "cuda"
    defaults = {
        "attention": (
            ("SmolLM-360M", "SmolLM-1.7B", "Llama-2-7B") if cuda else ("SmolLM-360M",),
            (512, 4096, 32768) if cuda else (128, 512, 4096, 32768),
            (1, 8) if cuda else (1,),
            ATTENTION_METHODS,
        ),
        "decode": (
            tuple(SHAPES) if cuda else ("SmolLM-135M",),
            (512, 1024, 4096, 32768) if cuda else (512, 4096, 16384),
            (1, 8) if cuda else (1,),
            DECODE_METHODS if cuda else CPU_DECODE_METHODS,
        ),
        "prefill": (tuple(SHAPES) if cuda else ("SmolLM-135M",), (2048,), (1,), PREFILL_METHODS),
    }
    cases = []
    for kind in settings.kinds:
        if kind == "embedded":
            cases.append(Case(kind, "large", 256, 1, settings.methods or EMBEDDED_METHODS))
            continue
        shapes, contexts, batches, methods = defaults[kind]
        if settings.quick:
            shapes, contexts, batches = shapes[:1], contexts[:2], batches[:1]
        methods = tuple(k for k in settings.methods or methods if kind == "attention" or k not in ("sdpa", "reference"))
        if kind == "attention":
            methods = tuple(key for key in methods if key not in ("quanto", "hqq"))
        for shape in settings.shapes or shapes:
            for batch in settings.batches or batches:
                for context in settings.contexts if settings.contexts and kind != "prefill" else contexts:
                    fast = tuple(k for k in methods if cuda or context <= STOCK_LIMIT or k not in ("quanto", "hqq"))
                    cases.append(Case(kind, shape, context, batch, fast))
    return cases


def interleave(
    openers: dict[str, Callable[[], object]], rounds: int, keep: bool, seed: int, tick: Callable[[], object]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]], dict[str, str]]:
    """Measure several runs in turn: per name the ms of each round, its facts, and for those that failed the reason.

    One warm-up round, then `rounds`, each in an order of its own, so that slow moments hit all alike. With `keep` the
    runs stay open between rounds, else only one is in memory at a time. A run that finds no memory is left out and
    the others go on.
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
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                failed[name] = str(error).splitlines()[0][:200]
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
    settings: Settings, device: torch.device, dtype: torch.dtype, progress: bool = True
) -> tuple[pd.DataFrame, float]:
    """Measure all cases; returns the table (columns `COLUMNS`, a row a method and case) and the copy bandwidth in GB/s.

    Shapes whose weights do not fit the device are left out with a line.
    """
    release_memory()
    copy_gbs = copy_bandwidth(device) / 1e9
    cases = plan(settings, device)
    rows: list[dict[str, object]] = []
    total = sum(len(case.methods) for case in cases) * (settings.rounds + 1)
    with tqdm(total=total, desc="benchmark", disable=not progress, leave=False) as bar:
        for model, case in _with_models(cases, settings.seed, device, dtype):
            bar.set_postfix_str(f"{case.kind} {case.shape} {case.context}x{case.batch}")
            methods = [method for method in (METHODS[key]() for key in case.methods) if _installed(method)]
            bar.update((len(case.methods) - len(methods)) * (settings.rounds + 1))
            openers = {m.name: _opener(m, case, settings, model, device, dtype) for m in methods}
            keep = device.type != "cuda" and case.kind != "embedded"
            times, facts, failed = interleave(openers, settings.rounds, keep, settings.seed, lambda: bar.update(1))
            for name, reason in failed.items():
                tqdm.write(f"{case.kind}, {case.shape}, {case.context} x {case.batch}: {name} left out, {reason}")
            rows += _rows(case, methods, str(dtype).removeprefix("torch."), times, facts, failed, copy_gbs)
    return pd.DataFrame(rows, columns=COLUMNS), copy_gbs


def _installed(method: Method) -> bool:
    return getattr(method.store, "installed", True)


def _with_models(
    cases: Sequence[Case], seed: int, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[object, Case]]:
    """Each case with the model that it runs on (None for attention), only one model in memory at a time."""
    model, held = None, None
    for case in sorted(cases, key=lambda case: (case.kind == "embedded", case.kind != "attention", case.shape)):
        wanted = None if case.kind == "attention" else case.shape
        if wanted != held:
            model = None
            release_memory()
            held = wanted
            if case.kind == "embedded":
                model, _ = load_model(ROOT / "data" / "models" / case.shape, device, dtype, quiet=True)
            elif wanted is not None:
                if _fits(case.shape, device, dtype):
                    model = random_model(case.shape, seed, device, dtype)
                else:
                    tqdm.write(f"{case.shape}: its weights do not fit the free memory of the device, left out")
        if model is not None or wanted is None:
            yield model, case


def _fits(shape: str, device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return weight_count(shape_config(shape)) * dtype.itemsize < 0.9 * free


def _opener(
    method: Method, case: Case, settings: Settings, model, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    seed = settings.seed
    if case.kind == "attention":
        config = shape_config(case.shape)
        numbers = 2 * case.batch * case.context * config.num_key_value_heads * config.head_dim
        layers = min(config.num_hidden_layers, max(2, SWEEP_BYTES // (numbers * dtype.itemsize)))
        sweeps = LONG_SWEEPS if case.context >= LONG else 16
        return partial(AttentionRun, method, config, case.context, case.batch, device, dtype, layers, sweeps, seed)
    if case.kind == "prefill":
        return partial(PrefillRun, method, model, case.context, case.batch, seed)
    embedded = case.kind == "embedded"
    rounds = 1 if embedded or device.type == "cuda" else settings.rounds + 1
    return partial(DecodeRun, method, model, case.context, case.batch, 1, rounds, embedded, seed)


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


def device_slug(device: str) -> str:
    """A device's name as part of a file name: lower case, letters and digits joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")


def save_benchmarks(
    table: pd.DataFrame, copy_gbs: float, settings: Settings, device: torch.device, folder: str | Path = FOLDER
) -> list[Path]:
    """Write one JSON a kind into `folder`: settings, copy bandwidth, provenance and the rows; returns their paths."""
    about = provenance(copy_gbs=round(copy_gbs, 3), settings=asdict(settings))
    if device.type == "cpu":
        about["device"] = cpu_name()
    paths = []
    for kind, part in table.groupby("kind", sort=False):
        rows = [
            {name: value for name, value in row.items() if not (isinstance(value, float) and np.isnan(value))}
            for row in part.to_dict("records")
        ]
        paths.append(Path(folder) / f"{device_slug(about['device'])}-{kind}.json")
        write_json(paths[-1], {**about, "rows": rows})
    return paths


def load_benchmarks(folder: str | Path = FOLDER) -> pd.DataFrame:
    """All measurements in `folder` as one table: `COLUMNS` and `device`, `threads`, `date`, `copy_gbs`.

    Raises `FileNotFoundError` where there are none.
    """
    import json

    parts = []
    for path in sorted(Path(folder).glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        part = pd.DataFrame(content["rows"]).reindex(columns=COLUMNS)
        parts.append(part.assign(**{name: content[name] for name in ("device", "threads", "date", "copy_gbs")}))
    if not parts:
        raise FileNotFoundError(f"no benchmark in {relative_to_root(folder)}: run python main.py bench first")
    return pd.concat(parts, ignore_index=True)


def report(table: pd.DataFrame, bars: pd.DataFrame, copy_gbs: float) -> str:
    """The table and the bars as text."""
    shown = ["method", "ms", "ratio", "ratio_low", "ratio_high", "code_bits", "bandwidth_gbs", "copy_share"]
    parts = [f"copy bandwidth {copy_gbs:.1f} GB/s, read and written"]
    for (kind, shape, batch, context), part in table.groupby(["kind", "shape", "batch", "context"], sort=False):
        parts.append(f"{kind}, {shape}, batch {batch}, {context:,} tokens; ms, and ratio to DynamicCache")
        columns = [name for name in shown if part[name].notna().any()]
        columns += [
            name
            for name in ("stored_bytes", "live_bytes", "peak_bytes")
            if kind != "attention" and part[name].notna().any()
        ]
        parts.append(part[columns].round(4).to_string(index=False))
    bars = bars[bars["result"] != "not measured"]
    for row in bars.to_dict("records"):
        interval = "" if np.isnan(row["low"]) else f" ({row['low']:.2f} to {row['high']:.2f})"
        parts.append(f"{row['result']}: {row['measured']:.2f}{interval}; {row['bar']}")
    return "\n".join(parts)


def run_command(options: argparse.Namespace) -> None:
    """Measure, print, compare with the bars, write."""
    best, dtype = choose_device()
    device = torch.device(options.device or best)
    dtype = dtype if device.type == best.type else torch.float32
    settings = Settings(
        tuple(options.what), tuple(options.shapes), tuple(options.contexts), tuple(options.batches),
        tuple(options.methods), options.rounds, options.seed, options.quick,
    )  # fmt: skip
    table, copy_gbs = run(settings, device, dtype)
    print(report(table, check_bars(table, CUDA_BARS if device.type == "cuda" else CPU_BARS), copy_gbs))
    if options.out != "-":
        for path in save_benchmarks(table, copy_gbs, settings, device, options.out or FOLDER):
            print(f"-> {relative_to_root(path)}")


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
    options = parser.parse_args(arguments)
    try:
        run_command(options)
    except (ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
