"""The threshold that gives a wanted usage (the large model's share of the tokens), found on what the gate writes."""

import math
from dataclasses import replace

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.batch import gated_texts
from helpers.gate.gate import EntropyGate, check_usage


def measure_usage(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    gate: EntropyGate,
    max_new_tokens: int = 50,
    **settings,
) -> tuple[float, np.ndarray]:
    """Share of all written tokens that are the large model's, and the signals at all of them, `[tokens]`.

    `settings` are those of `gated_texts`, which writes them, and of `gated_generate`.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to measure usage on")
    results = gated_texts(small, large, tokenizer, prompts, gate, max_new_tokens, **settings)
    written = sum(len(result.authors) for result in results)
    usage = sum(result.usage * len(result.authors) for result in results) / written
    return usage, np.concatenate([result.signal for result in results])


def correct_by_bisection(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    gate: EntropyGate,
    target_usage: float,
    max_new_tokens: int = 50,
    rounds: int = 8,
    tolerance: float = 0.01,
    **settings,
) -> EntropyGate:
    """The gate with the threshold at which the large model writes `target_usage` of the tokens on these prompts.

    Starts from the gate's own threshold, then tries the quantile of the signals just seen, and bisects where that
    leaves the bracket of thresholds known to be too low and too high; until usage is within `tolerance` of the target
    or `rounds` generations of all prompts were made. The best threshold met wins. Use prompts that the evaluation does
    not use. With a rollback, tokens that it puts in count as the large model's, and a low target may be out of reach.
    """
    check_usage(target_usage)
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    plain = EntropyGate(gate.threshold, gate.signal, gate.rollback, gate.seed)  # a tracker would move while measured
    if target_usage in (0, 1):
        return replace(plain, threshold=math.inf if target_usage == 0 else -math.inf)
    low, high = -math.inf, math.inf  # thresholds known to be too low and too high
    best, error, threshold = plain, math.inf, plain.threshold
    for _ in range(rounds):
        tried = replace(plain, threshold=threshold)
        usage, signals = measure_usage(small, large, tokenizer, prompts, tried, max_new_tokens, **settings)
        if abs(usage - target_usage) < error:
            best, error = tried, abs(usage - target_usage)
        if error <= tolerance:
            break
        if usage > target_usage:
            low = max(low, threshold)
        else:
            high = min(high, threshold)
        threshold = float(np.quantile(signals, 1 - target_usage))
        if not low < threshold < high:  # bisect, or where there is no upper end yet go up by 1
            threshold = (max(low, 0.0) + (high if math.isfinite(high) else max(low, 0.0) + 2.0)) / 2
    return best
