"""The commands that draw figures beside what they measure: `python main.py card` and `bench`."""

from dataclasses import dataclass
from typing import Literal

import pandas as pd

from helpers.evaluation.benchmark.cases import KINDS
from helpers.evaluation.benchmark.command import run_command
from helpers.evaluation.benchmark.methods import METHODS
from helpers.io.paths import ROOT
from helpers.models.items import load_multiple_choice
from helpers.models.presets import get_preset
from helpers.models.shapes import SHAPES
from helpers.publishing import plots
from helpers.training.model_card import PAIR, measure_pair, write_card


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
    write_card(folder, measured)
    for name in PAIR:
        print(name, measured[name], f"{measured['ms_per_token'][name]:.2f} ms per token")


@dataclass(frozen=True)
class BenchOptions:
    """What is timed, on which device, and where it is written."""

    what: tuple[Literal[*KINDS], ...] = KINDS
    shapes: tuple[Literal[*SHAPES], ...] = ()  # default: by device
    contexts: tuple[int, ...] = ()  # tokens in the cache; default: by device
    batches: tuple[int, ...] = ()  # default: 1 on CPU, 1 and 8 on CUDA
    methods: tuple[Literal[*METHODS], ...] = ()  # default: by kind
    rounds: int = 5
    quick: bool = False  # one shape and two contexts a kind
    device: str | None = None  # default: the first accelerator, else the CPU
    seed: int = 0
    out: str | None = None  # folder instead of data/benchmarks; - for none
    figure: bool = False  # draw figures/04_kernels.png of what --out holds


def bench(options: BenchOptions) -> None:
    """Time kernels, decode steps and prompts against the caches of transformers."""
    run_command(options)
