"""Finding the threshold of a gate: a percentile of the signal on texts, then a correction on what the gate writes.

Text that a model writes itself has another distribution of entropies than text it reads, so a percentile of read text
rarely gives the usage it names. `correct_by_bisection` finds the threshold that does, on prompts that are not those
of the evaluation; `gate.OnlineTracker` finds it while generating.
"""

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.files import write_json
from helpers.gate import SIGNALS, EntropyGate, gated_generate, uncertainty
from helpers.models import encode

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


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration, dtype and a sample of every weight: other weights, other hash."""
    config = model.config.to_diff_dict()
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()


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

    `settings` are those of `gated_generate`.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to measure usage on")
    results = [gated_generate(small, large, tokenizer, p, gate, max_new_tokens, **settings) for p in prompts]
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

    Starts from the gate's own threshold and halves the bracket until usage is within `tolerance` of the target or
    `rounds` generations of all prompts were made; the best threshold met wins. Use prompts that the evaluation does
    not use. With a rollback, tokens that it puts in count as the large model's, and a low target may be out of reach.
    """
    if not 0 <= target_usage <= 1:
        raise ValueError(f"target_usage must be a share between 0 and 1, got {target_usage}")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds}")
    plain = EntropyGate(gate.threshold, gate.signal, gate.rollback, gate.seed)  # a tracker would move while measured
    if target_usage in (0, 1):
        return replace(plain, threshold=math.inf if target_usage == 0 else -math.inf)
    low, high = -math.inf, math.inf  # thresholds known to be too low and too high
    best, error, threshold = plain, math.inf, plain.threshold
    for _ in range(rounds):
        usage, signals = measure_usage(
            small, large, tokenizer, prompts, replace(plain, threshold=threshold), max_new_tokens, **settings
        )
        if abs(usage - target_usage) < error:
            best, error = replace(plain, threshold=threshold), abs(usage - target_usage)
        if error <= tolerance:
            break
        if usage > target_usage:
            low = max(low, threshold)
        else:
            high = min(high, threshold)
        # The quantile of what was just seen is close already; where it leaves the bracket, halve that.
        threshold = float(np.quantile(signals, 1 - target_usage))
        if not low < threshold < high:
            threshold = (max(low, 0.0) + (high if math.isfinite(high) else max(low, 0.0) + 2.0)) / 2
    return best
