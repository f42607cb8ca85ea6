"""The commands that draw figures beside what they measure: `python main.py card` and `bench`."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pandas as pd
import tyro

from helpers.evaluation.benchmark import BenchmarkOptions, run_benchmark_command
from helpers.evaluation.benchmark.cases import KINDS
from helpers.evaluation.benchmark.results import FOLDER, load_benchmarks
from helpers.io import ROOT, relative_to_root
from helpers.models import get_preset, load_multiple_choice
from helpers.publishing import plots
from helpers.training.model_card import PAIR, measure_pair, write_pair_card


def card(holdout_text: str | None = None) -> None:
    """Measure the embedded pair, rewrite its card and draw its training curves.

    Args:
        holdout_text: the story file whose last tenth was held out in training
    """
    preset, folder = get_preset("embedded"), ROOT / "data" / "models"
    logs = {}
    for name in PAIR:
        log = pd.read_csv(folder / name / "training_log.csv")
        settings = pd.read_json(folder / name / "training.json", typ="series")["settings"]
        logs[name] = log.assign(tokens=log["step"] * settings["batch"] * settings["context"])
    figure = plots.training_curves(logs, "The large model pulls ahead and stays there", "mean loss of 50 steps each")
    plots.save_figure(figure, preset.figures_dir, "00_training_curves")
    measured = measure_pair(folder, load_multiple_choice(preset.multiple_choice), holdout_text)
    write_pair_card(folder, measured)
    for name in PAIR:
        print(name, measured[name], f"{measured['ms_per_token'][name]:.2f} ms per token")


@dataclass(frozen=True)
class BenchOptions(BenchmarkOptions):
    """What is timed, on which device, and where it is written; what is left out follows from the device."""

    kinds: Annotated[tuple[Literal[*KINDS], ...], tyro.conf.arg(name="what")] = KINDS


def bench(options: BenchOptions, figure: bool = False) -> None:
    """Time kernels, decode steps and prompts against the caches of transformers.

    Args:
        figure: draw figures/04_kernels.png of what --out holds
    """
    device = run_benchmark_command(options)
    if figure:
        measured = load_benchmarks(FOLDER if options.out in (None, "-") else options.out)
        path = plots.save_figure(
            plots.benchmark_figure(measured[measured["device"] == device]), ROOT / "figures", "04_kernels"
        )
        print(f"-> {relative_to_root(path)}")
