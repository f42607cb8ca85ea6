"""A threshold from a percentile of the signal on texts."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.gate import EntropyGate
from helpers.gate.signals import SIGNALS, uncertainty
from helpers.io.results import write_json
from helpers.models.fingerprint import fingerprint
from helpers.models.tokens import encode

MAX_TOKENS = 512  # of a text that are read


def calibrate(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    percentile: float = 50,
    signal: str = "entropy",
    target_usage: float | None = None,
    max_tokens: int = MAX_TOKENS,
    cache_dir: str | Path | None = None,
    rollback: float | None = None,
    progress: bool = True,
) -> EntropyGate:
    """A gate at a percentile of the small model's signal over all tokens of `texts`.

    Percentile p fires on the most uncertain (100 - p)% of the tokens of such text; `target_usage` u stands for the
    percentile 100 (1 - u). 0 fires always and 100 never, whatever the text. The "random" signal needs no text. With
    `cache_dir` the threshold is kept there and found again for the same model, tokens, percentile and signal.

    Raises `ValueError` for a percentile outside 0-100, for no or only empty texts, and for the oracle, whose
    threshold is no percentile of text.
    """
    if target_usage is not None:
        if not 0 <= target_usage <= 1:
            raise ValueError(f"target_usage must be a share between 0 and 1, got {target_usage}")
        percentile = 100 * (1 - target_usage)
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie between 0 and 100, got {percentile}")
    if signal == "oracle":
        raise ValueError("signal 'oracle' is not calibrated on text: use EntropyGate(0.0, 'oracle')")
    if signal not in SIGNALS:
        raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {signal!r}")
    if percentile in (0, 100):
        return EntropyGate(-math.inf if percentile == 0 else math.inf, signal, rollback)
    if signal == "random":
        return EntropyGate(percentile / 100, signal, rollback)
    if not any(text.strip() for text in texts):
        raise ValueError(f"texts: {len(texts)} given, and none that holds anything to read")
    ids = [encode(tokenizer, text, max_tokens) for text in texts if text.strip()]
    key = {"model": fingerprint(small), "texts": _hash(ids), "percentile": float(percentile), "signal": signal}
    path = Path(cache_dir) / f"threshold-{_hash(key)[:16]}.json" if cache_dir else None
    threshold = _cached_threshold(path, key) if path else None
    if threshold is None:
        threshold = float(np.percentile(text_signals(small, ids, signal, progress), percentile))
        if path:
            write_json(path, key | {"threshold": threshold})
    return EntropyGate(threshold, signal, rollback)


@torch.no_grad()
def text_signals(
    small: PreTrainedModel, ids: list[list[int]], signal: str = "entropy", progress: bool = True
) -> np.ndarray:
    """The signal after every token of texts given as token ids, one after the other: float64 `[tokens]`."""
    limit = getattr(small.config.get_text_config(decoder=True), "max_position_embeddings", None)
    values = []
    for text in tqdm(ids, disable=not progress):
        given = torch.tensor([text[:limit]], device=small.device)
        values.append(uncertainty(small(input_ids=given, use_cache=False).logits[0], signal).double().cpu())
    signals = torch.cat(values).numpy()
    if np.isnan(signals).any():
        raise ValueError(
            f"logits hold NaN or infinity after {np.isnan(signals).sum()} of {len(signals)} tokens of the calibration "
            "texts: run the model in float32 or bfloat16"
        )
    return signals


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _cached_threshold(path: Path, key: dict[str, object]) -> float | None:
    """The threshold kept for `key`; None where there is none, or a file that was damaged or is of something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or {name: content.get(name) for name in key} != key:
        return None
    threshold = content.get("threshold")
    return threshold if isinstance(threshold, float) and math.isfinite(threshold) else None
