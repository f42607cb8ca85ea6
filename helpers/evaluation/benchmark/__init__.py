"""Speed of attention on packed codes and of whole decode steps, against the caches of transformers.

Random weights and made-up caches: nothing here says how good a method is. `run_benchmark_command` is
`python main.py bench`; results lie in `data/benchmarks`, one JSON a machine and kind, with the time of every round.
"""

from helpers.evaluation.benchmark.cases import Settings
from helpers.evaluation.benchmark.command import BenchmarkOptions, run_benchmark_command
from helpers.evaluation.benchmark.results import benchmark_report, describe_machine, load_benchmarks, ratio_table
from helpers.evaluation.benchmark.targets import CPU_TARGETS, CUDA_TARGETS, check_targets

__all__ = [
    "CPU_TARGETS",
    "CUDA_TARGETS",
    "BenchmarkOptions",
    "Settings",
    "benchmark_report",
    "check_targets",
    "describe_machine",
    "load_benchmarks",
    "ratio_table",
    "run_benchmark_command",
]
