"""Measuring methods, the ways to store a cache: quality, multiple choice, latency, memory, and speed of kernels.

Every measurement takes a `Method` and treats all alike. What measures the gate is in `helpers.gate.study`; ROUGE is in
`helpers.evaluation.rouge`, which this does not import because that takes seconds.
"""

from helpers.evaluation.bootstrap import bootstrap_groups, bootstrap_mean, bootstrap_median, bootstrap_ratio
from helpers.evaluation.comparison import Comparison, compare_methods, save_comparison, standard_pairs
from helpers.evaluation.fixed_widths import quality_table, sample_sequences
from helpers.evaluation.latency import LATENCY, controller_share, time_decoding
from helpers.evaluation.length import against_length, follow_text
from helpers.evaluation.methods import (
    FullPrecision,
    Group,
    PackedMethod,
    StockQuantized,
    default_methods,
    seven_methods,
)
from helpers.evaluation.metrics import classification_scores, kl_divergence, next_token_hits, rank_correlation
from helpers.evaluation.multiple_choice import ending_log_likelihoods, score_items
from helpers.evaluation.quality import measure_method

__all__ = [
    "LATENCY",
    "Comparison",
    "FullPrecision",
    "Group",
    "PackedMethod",
    "StockQuantized",
    "against_length",
    "bootstrap_groups",
    "bootstrap_mean",
    "bootstrap_median",
    "bootstrap_ratio",
    "classification_scores",
    "compare_methods",
    "controller_share",
    "default_methods",
    "ending_log_likelihoods",
    "follow_text",
    "kl_divergence",
    "measure_method",
    "next_token_hits",
    "quality_table",
    "rank_correlation",
    "sample_sequences",
    "save_comparison",
    "score_items",
    "seven_methods",
    "standard_pairs",
    "time_decoding",
]
