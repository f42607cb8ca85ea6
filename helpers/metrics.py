"""Measures over plain tensors, arrays and texts: agreement with full precision, accuracy, ROUGE, and intervals."""

import re
from collections.abc import Callable

import numpy as np
import pandas as pd
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
    return _bootstrap(values, np.mean, resamples, level, seed)


def bootstrap_median(
    values: np.ndarray, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Median of `values` with a percentile bootstrap interval: (median, low, high)."""
    return _bootstrap(values, np.median, resamples, level, seed)


def _bootstrap(values: np.ndarray, statistic, resamples: int, level: float, seed: int) -> tuple[float, float, float]:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be a non-empty list with one number a text, got shape {values.shape}")
    draws = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(statistic(values[draws], axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(values)), float(low), float(high)


def bootstrap_groups(
    statistic: Callable[[np.ndarray], float],
    groups: np.ndarray,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float, float]:
    """`statistic(rows)` with an interval from resampling whole groups (texts): (value, low, high).

    `statistic` takes an integer array of row numbers; `groups` `[rows]` names each row's text.
    """
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    random = np.random.default_rng(seed)
    values = [
        statistic(np.concatenate([members[i] for i in random.integers(len(members), size=len(members))]))
        for _ in range(resamples)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(np.arange(len(groups)))), float(low), float(high)


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


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(predictions: list[str], references: list[str], use_stemmer: bool = True) -> dict[str, np.ndarray]:
    """ROUGE F-measures of each text against its reference, one array a type, by the `rouge_score` package.

    Words are compared without endings (Porter's stemmer) unless `use_stemmer` is False. For "rougeLsum" texts are cut
    into sentences at `.`, `!` and `?`. Raises `ValueError` where the numbers of texts differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(predictions) != len(references):
        raise ValueError(f"predictions and references must be as many, got {len(predictions)} and {len(references)}")
    scorer = RougeScorer(list(ROUGE_TYPES), use_stemmer=use_stemmer)
    rows = [
        scorer.score(_one_sentence_a_line(reference), _one_sentence_a_line(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: np.array([row[name].fmeasure for row in rows]) for name in ROUGE_TYPES}


def _one_sentence_a_line(text: str) -> str:
    return re.sub(r"([.!?][\"')\]]*)\s+", r"\1\n", text.strip())


def bootstrap_ratio(
    numerator: np.ndarray, denominator: np.ndarray, resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Ratio of the means of two per-text measures with a paired bootstrap interval over texts: (ratio, low, high)."""
    pairs = np.stack([np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)])
    if pairs.ndim != 2 or not pairs.shape[1]:
        raise ValueError(f"numerator and denominator must hold one number a text each, got shape {pairs.shape[1:]}")
    draws = np.random.default_rng(seed).integers(pairs.shape[1], size=(resamples, pairs.shape[1]))
    above, below = pairs[:, draws].mean(axis=-1)
    low, high = np.quantile(above / below, [(1 - level) / 2, (1 + level) / 2])
    return float(pairs[0].mean() / pairs[1].mean()), float(low), float(high)
