"""`python main.py bench`."""

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from helpers.cache.attention.dispatch import implementation_name
from helpers.evaluation.benchmark.bars import CPU_TARGETS, CUDA_TARGETS, check_targets
from helpers.evaluation.benchmark.cases import KINDS, Settings
from helpers.evaluation.benchmark.measuring import device_name, run
from helpers.evaluation.benchmark.methods import METHODS
from helpers.evaluation.benchmark.results import FOLDER, load_benchmarks, report, save_benchmarks
from helpers.io.paths import ROOT, relative_to_root
from helpers.models.loading import choose_device
from helpers.models.shapes import SHAPES
from helpers.publishing.plots.benchmark import benchmark_figure
from helpers.publishing.plots.style import save_figure


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
    print(report(table, check_targets(table, CUDA_TARGETS if device.type == "cuda" else CPU_TARGETS), copy_gbs))
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
