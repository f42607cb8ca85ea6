"""The commands of this package: `python main.py gate` (the default), `gate-fidelity` and `gate-bench`."""

from dataclasses import dataclass
from typing import Literal

from helpers.gate.study import benchmark, fidelity
from helpers.gate.study.report import report as report_gate
from helpers.io.paths import ROOT
from helpers.models.presets import get_preset


@dataclass(frozen=True)
class GateOptions:
    """Models, prompts and threshold of the report."""

    small: str | None = None  # folder or hub name instead of the preset's small model
    large: str | None = None  # folder or hub name instead of the preset's large model
    articles: str | None = None  # file or hub name instead of the preset's prompts
    calibration: str | None = None  # file or hub name instead of the preset's calibration texts
    percentile: float = 50  # of the signal on the calibration texts
    calibration_texts: int = 100  # number of calibration texts
    prompts: int = 5  # number of prompts
    max_new_tokens: int = 50
    signal: str = "entropy"  # entropy, max_prob, margin or random (the control)
    rollback: float | None = None  # bits: take back tokens that cost the large model more
    target_usage: float | None = None  # share of tokens instead of --percentile, corrected to it
    correct: Literal["bisection", "online"] = "bisection"  # how to correct
    repeats: int = 1  # runs of each prompt, of which the median time counts
    max_prompt_tokens: int = 1024  # articles are cut to this
    fixed_length: bool = False  # write on after the end of a text
    seed: int = 0
    out: str | None = None  # CSV file for the results of each prompt


def gate(options: GateOptions, preset: str | None = None, recalibrate: bool = False) -> None:
    """Compare entropy-gated generation with its baselines and print the report.

    Args:
        preset: embedded (default), smollm or llama; also the variable PRESET
        recalibrate: do not use thresholds found before
    """
    report_gate(get_preset(preset), **vars(options), cache_dir=None if recalibrate else ROOT / "data" / ".calibration")


def gate_fidelity(settings: fidelity.FidelitySettings, preset: str | None = None, out: str | None = None) -> None:
    """What every signal of the gate is worth over random calls.

    Args:
        preset: embedded (default), smollm or llama; also the variable PRESET
        out: CSV file instead of the preset's gate_fidelity.csv
    """
    fidelity.report_fidelity(get_preset(preset), settings, out)


def gate_bench(settings: benchmark.GateBenchmark, out: str | None = None) -> None:
    """Speed of the gate with models of real sizes and random weights.

    Args:
        out: JSON file instead of data/benchmarks/gate_<pair>.json; - for none
    """
    benchmark.report(settings, out)
