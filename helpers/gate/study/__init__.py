"""What the gate gains and costs: against each model alone and assisted generation, its signals against random calls.

*Usage* is the share of the tokens that the large model writes, *fidelity* how close a gated text comes to the one that
the large model writes alone (ROUGE-L, 1 where they are the same), the *oracle* the gate that knows the large model's
choices.

Read `evaluation` first. Its tables are summed up in `summaries` and `sweep`; `report`, `fidelity` and `benchmark` are
the commands of `main.py`, `parts` says where the time goes, `learned` what the learned signal knows.
"""

from helpers.gate.prompts import fit_prompts, sample_articles
from helpers.gate.study.baselines import assisted_generate, plain_generate
from helpers.gate.study.benchmark import FixedShareGate, GateBenchmark, run_gate_benchmark
from helpers.gate.study.evaluation import GATED, METHODS, evaluate_caches, evaluate_gate, evaluate_texts
from helpers.gate.study.fidelity import FidelitySettings, cut_stories, report_fidelity
from helpers.gate.study.learned import caught_by_signal, input_importance
from helpers.gate.study.parts import ideal_with_prompt, parts_against_ideal, time_parts
from helpers.gate.study.report import ReportSettings, report_gate
from helpers.gate.study.summaries import paired_intervals, speed_against_ideal, summarise_gates, summarise_methods
from helpers.gate.study.sweep import gains_over_random, sweep_gates, threshold_on_gated_text

__all__ = [
    "GATED", "METHODS", "FidelitySettings", "FixedShareGate", "GateBenchmark", "ReportSettings", "assisted_generate",
    "caught_by_signal", "cut_stories", "evaluate_caches", "evaluate_gate", "evaluate_texts", "fit_prompts",
    "gains_over_random", "ideal_with_prompt", "input_importance", "paired_intervals", "parts_against_ideal",
    "plain_generate", "report_fidelity", "report_gate", "run_gate_benchmark", "sample_articles",
    "speed_against_ideal", "summarise_gates", "summarise_methods", "sweep_gates", "threshold_on_gated_text",
    "time_parts",
]  # fmt: skip
