"""Tables of the documents: a function each, from results files in `data/` to Markdown; by subject, a file each."""

from collections.abc import Callable

from helpers.publishing.tables.assignment import assignment_table
from helpers.publishing.tables.benchmark import benchmark_table
from helpers.publishing.tables.comparison import (
    carried_table,
    coding_table,
    collected_table,
    comparison_table,
    multiple_choice_table,
    pair_table,
    quality_table,
)
from helpers.publishing.tables.gate import (
    gate_fidelity_table,
    gate_gains_table,
    gate_parts_table,
    gate_sizes_table,
    gate_speed_table,
    gate_usage_table,
)
from helpers.publishing.tables.harness import chat_table, facts_table, harness_table
from helpers.publishing.tables.headline import headline_table
from helpers.publishing.tables.memory import memory_table
from helpers.publishing.tables.texts import text_files_table
from helpers.publishing.tables.weights import weights_table

TABLES: dict[str, Callable[[], str]] = {
    "assignment": assignment_table,
    "headline": headline_table,
    "compare-smollm2": lambda: comparison_table("smollm2/baseline_comparison", latency=True),
    "compare-smollm2-4096": lambda: comparison_table("smollm2/comparison_4096"),
    "coding-smollm2": lambda: coding_table("smollm2/coding"),
    "coding-biased": lambda: coding_table("smollm2/coding_biased"),
    "carried": carried_table,
    "compare-embedded": lambda: comparison_table("baseline_comparison", latency=True),
    "quality-large": lambda: quality_table("quality_large"),
    "memory": memory_table,
    "benchmarks": benchmark_table,
    "harness": harness_table,
    "facts": facts_table,
    "chat": chat_table,
    "multiple-choice": multiple_choice_table,
    "gate-usage": gate_usage_table,
    "gate-speed": gate_speed_table,
    "gate-gains": gate_gains_table,
    "gate-fidelity": gate_fidelity_table,
    "gate-sizes": gate_sizes_table,
    "gate-parts": gate_parts_table,
    "weights": weights_table,
    "collected": collected_table,
    "pair": pair_table,
    "text-files": text_files_table,
}
