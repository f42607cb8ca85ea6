"""Entropy-gated generation: a small model writes a text, and where it is unsure a large model writes that token.

Read `signals`, `gate` and `generation`; the rest are their parts: thresholds (`calibration`, `correction`), prompts,
reading and writing. `learned` is the signal that is trained (`training`), `batch` writes several texts at once. What
a gate gains and costs is measured in `helpers.gate.study`, which nothing here needs.

Words: *usage* is the share of the written tokens that are the large model's; the *oracle* is the ideal gate, which
asks the large model at every step and so saves nothing.
"""

from helpers.gate.batch import gated_generate_batch
from helpers.gate.calibration import text_signals
from helpers.gate.correction import correct_by_bisection, measure_usage
from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.generation import gated_generate
from helpers.gate.learned import LearnedSignal, signal_of_pair
from helpers.gate.prompts import check_same_tokens, end_tokens, prompt_ids
from helpers.gate.signals import SIGNALS, Signal
from helpers.gate.text import LARGE, SMALL, Generated, trace

__all__ = [
    "LARGE", "SIGNALS", "SMALL", "EntropyGate", "Generated", "LearnedSignal", "OnlineTracker", "Signal",
    "check_same_tokens", "correct_by_bisection", "end_tokens", "gated_generate", "gated_generate_batch",
    "measure_usage", "prompt_ids", "signal_of_pair", "text_signals", "trace",
]  # fmt: skip
