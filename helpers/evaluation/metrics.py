"""Measures over plain tensors and arrays: agreement with full precision, accuracy, classification."""

import numpy as np
import pandas as pd
import torch

from helpers.evaluation.bootstrap import bootstrap_groups


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of next-token distributions in nats: `[..., vocabulary]` twice, gives `[...]`."""
    p, q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (reference_logits, logits))
    return (p.exp() * (p - q)).sum(-1)


def next_token_hits(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Whether the most probable token is the one that follows; `logits` `[B, n, V]` at the tokens before `[B, n]`."""
    return logits.argmax(-1) == token_ids


def macro_f1(labels: np.ndarray, predicted: np.ndarray) -> float:
    """Mean over the classes that occur in `labels` of F1 = 2 TP / (2 TP + FP + FN)."""
    scores = []
    for kind in np.unique(labels):
        hits = np.sum((labels == kind) & (predicted == kind))
        scores.append(2 * hits / (np.sum(labels == kind) + np.sum(predicted == kind)))
    return float(np.mean(scores))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, ties at their mean rank."""
    return float(pd.Series(a).rank().corr(pd.Series(b).rank()))


def classification_scores(labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray) -> dict[str, tuple]:
    """`accuracy` and `macro-F1`, each (value, low, high) with whole `groups` (texts) resampled."""
    return {
        "accuracy": bootstrap_groups(lambda rows: float(np.mean(labels[rows] == predicted[rows])), groups),
        "macro-F1": bootstrap_groups(lambda rows: macro_f1(labels[rows], predicted[rows]), groups),
    }
