"""Every figure, drawn from plain tables: one file a notebook, colours and frames in `style`."""

from helpers.publishing.plots.benchmark import benchmark_figure
from helpers.publishing.plots.collection import correlation_heat_map, entropy_against_rarity, latency_distribution
from helpers.publishing.plots.comparison import against_length, latency_bars, pareto
from helpers.publishing.plots.facts import facts_by_depth
from helpers.publishing.plots.gate import (
    against_usage,
    gate_choice,
    gate_trace,
    signal_distributions,
    speedup_against_usage,
)
from helpers.publishing.plots.integration import bytes_over_text, kl_bars
from helpers.publishing.plots.style import save_figure
from helpers.publishing.plots.tokens import tokens_by_author, tokens_by_width
from helpers.publishing.plots.training import (
    confusion_matrices,
    importances,
    learning_curves,
    rate_distortion,
    reliability,
    training_curves,
)
