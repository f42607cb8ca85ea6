"""`python main.py bench`: measure, print, compare with the targets, write."""

from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from helpers.cache import implementation_name
from helpers.evaluation.benchmark.cases import Settings
from helpers.evaluation.benchmark.measuring import run
from helpers.evaluation.benchmark.results import FOLDER, benchmark_report, save_benchmarks
from helpers.evaluation.benchmark.targets import CPU_TARGETS, CUDA_TARGETS, check_targets
from helpers.evaluation.device import device_name
from helpers.io import relative_to_root
from helpers.models import choose_device


@dataclass(frozen=True)
class BenchmarkOptions(Settings):
    """What is measured, on which device, and where results go."""

    device: str | None = None  # the first accelerator, else the CPU
    out: str | None = None  # folder; None: data/benchmarks; "-" for no files


def run_benchmark_command(options: BenchmarkOptions) -> str:
    """Measure, print the report and the targets, write files after every case; returns the name of the device."""
    best, dtype = choose_device()
    device = torch.device(options.device or best)
    dtype = dtype if device.type == best.type else torch.float32
    about = {name: value for name, value in asdict(options).items() if name not in ("device", "out")}
    about |= {"attention": implementation_name(device.type)}
    paths: list[Path] = []

    def save(table: pd.DataFrame, copy_gbs: float) -> None:
        if options.out != "-":
            paths[:] = save_benchmarks(table, copy_gbs, about, device_name(device), options.out or FOLDER)

    table, copy_gbs = run(options, device, dtype, save=save)
    targets = CUDA_TARGETS if device.type == "cuda" else CPU_TARGETS
    print(benchmark_report(table, check_targets(table, targets), copy_gbs))
    for path in paths:
        print(f"-> {relative_to_root(path)}")
    return device_name(device)
