"""Measures over plain tensors and arrays: agreement with full precision, accuracy, classification."""

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.metrics import f1_score

from helpers.evaluation.bootstrap import Interval, bootstrap_groups


def kl_divergence(reference_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || other) of next-token distributions in nats: `[..., vocabulary]` twice, gives `[...]`."""
    p, q = (x.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(-1) for x in (reference_logits, logits))
    return (p.exp() * (p - q)).sum(-1)


def next_token_hits(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Whether the most probable token is the one that follows; `logits` `[B, n, V]` at the tokens before `[B, n]`."""
    return logits.argmax(-1) == token_ids


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(a, b).statistic)


def classification_scores(labels: np.ndarray, predicted: np.ndarray, groups: np.ndarray) -> dict[str, Interval]:
    """`accuracy` and `macro-F1` (over the classes that occur), each with whole `groups` (texts) resampled."""

    def macro_f1(rows: np.ndarray) -> float:
        return f1_score(labels[rows], predicted[rows], labels=np.unique(labels[rows]), average="macro")

    return {
        "accuracy": bootstrap_groups(lambda rows: float(np.mean(labels[rows] == predicted[rows])), groups),
        "macro-F1": bootstrap_groups(macro_f1, groups),
    }
