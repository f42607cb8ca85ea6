"""Thresholds from texts: percentiles of a signal over what the small model reads, kept on disk for the next time.

Knows nothing of gates: `EntropyGate.calibrate` is the door. What a model writes is surer than what it reads, so that
a gate fires less often than the percentile says; `correction.py` mends that.
"""

import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.hidden import noting_hidden
from helpers.gate.signals import Signal, find_signal
from helpers.io.results import key_hash, read_keyed, write_keyed
from helpers.models import fingerprint
from helpers.models.tokens import context_length, encode


def percentile_threshold(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    percentile: float,
    signal: str | Signal = "entropy",
    max_tokens: int = 512,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> float:
    """The percentile of the small model's signal over all tokens of `texts`: see `EntropyGate.calibrate`.

    `max_tokens` of each text are read. With `cache_dir` the threshold is kept there and found again for the same
    model, tokens, percentile and signal.
    """
    signal = find_signal(signal)
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie between 0 and 100, got {percentile}")
    if signal.needs_large:
        raise ValueError(f"signal {signal} is not calibrated on text: use EntropyGate(0.0, {signal})")
    if percentile in (0, 100):
        return -math.inf if percentile == 0 else math.inf
    if signal.uniform:
        return percentile / 100
    if not any(text.strip() for text in texts):
        raise ValueError(f"texts: {len(texts)} given, and none that holds anything to read")
    ids = [encode(tokenizer, text, max_tokens) for text in texts if text.strip()]
    if cache_dir is None:
        return float(np.percentile(text_signals(small, ids, signal, progress), percentile))
    key = {"model": fingerprint(small), "texts": ids, "percentile": float(percentile), "signal": signal.identity}
    path = Path(cache_dir) / f"threshold-{key_hash(key)[:16]}.json"
    kept = (read_keyed(path, key) or {}).get("threshold")
    if isinstance(kept, float) and math.isfinite(kept):
        return kept
    threshold = float(np.percentile(text_signals(small, ids, signal, progress), percentile))
    write_keyed(path, key, {"threshold": threshold})
    return threshold


@torch.no_grad()
def text_signals(
    small: PreTrainedModel, ids: list[list[int]], signal: str | Signal = "entropy", progress: bool = True
) -> np.ndarray:
    """The signal after every token of texts given as token ids, one after the other: float64 `[tokens]`."""
    signal, limit, values = find_signal(signal), context_length(small), []
    with noting_hidden(small, signal.needs_hidden) as hidden:
        for text in tqdm(ids, disable=not progress):
            given = torch.tensor([text[:limit]], device=small.device)
            logits = small(input_ids=given, use_cache=False).logits[0]
            states = hidden.states[0] if hidden.wanted else None
            values.append(signal.of_text(logits, states, text[:limit]).double().cpu())
    signals = torch.cat(values).numpy()
    if np.isnan(signals).any():
        raise ValueError(
            f"logits hold NaN or infinity after {np.isnan(signals).sum()} of {len(signals)} tokens of the calibration "
            "texts: run the model in float32 or bfloat16"
        )
    return signals
