"""Measures over plain tensors and arrays: agreement with full precision, accuracy, and their intervals."""

import numpy as np
import torch


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of next-token distributions in nats: `[..., vocabulary]` twice, gives `[...]`."""
    p, q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (reference_logits, logits))
    return (p.exp() * (p - q)).sum(-1)


def next_token_hits(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Whether the most probable token is the one that follows; `logits` `[B, n, V]` at the tokens before `[B, n]`."""
    return logits.argmax(-1) == token_ids


def bootstrap_mean(
    values: np.ndarray, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of per-text `values` with a percentile bootstrap interval over texts: (mean, low, high).

    Pass per-text differences for a paired comparison.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty list with one number a text, got shape {values.shape}")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
