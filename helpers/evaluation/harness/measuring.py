"""Tasks of the harness under several methods, item by item, and the table of what each method changes."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from helpers.evaluation.harness.adapter import PackedLM
from helpers.evaluation.methods import Method

PERPLEXITY = "word_perplexity"
METRICS = ("acc", "acc_norm", PERPLEXITY)


def item_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    method: Method,
    batch_size: int = 1,
    max_length: int | None = None,
    limit: int | None = None,
) -> dict[tuple[str, str], np.ndarray]:
    """Scores of every item by task and metric: `[items]`, of perplexity `[2, items]` (log-likelihood, words)."""
    asked = PackedLM(model, tokenizer, method, batch_size, max_length)
    found = evaluate(asked, dict(tasks), limit=limit, bootstrap_iters=0, log_samples=True)
    scores: dict[tuple[str, str], np.ndarray] = {}
    for task, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        for metric in samples[0]:
            values = [sample[metric] for sample in samples]
            if metric in METRICS or (metric in samples[0]["metrics"] and np.ndim(values) == 1):
                scores[task, metric] = np.array(values, dtype=np.float64).T
    return scores


def harness_table(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Task],
    methods: Sequence[Method],
    batch_size: int = 1,
    max_length: int | None = None,
    limit: int | None = None,
) -> pd.DataFrame:
    """A row a task, metric and method: value, its change from the first method's, 95% intervals over items (paired)."""
    rows, first = [], {}
    for method in methods:
        for key, scores in item_scores(model, tokenizer, tasks, method, batch_size, max_length, limit).items():
            reference = first.setdefault(key, scores)
            if key[1] == PERPLEXITY:
                value, high, low = (float(np.exp(-x)) for x in bootstrap_ratio(*scores))
                change = _perplexity_change(scores, reference)
            else:
                value, low, high = bootstrap_mean(scores)
                change = bootstrap_mean(scores - reference)
            names = ("task", "metric", "method", "items", "value", "low", "high", "change", "change_low", "change_high")
            rows.append(dict(zip(names, (*key, method.name, scores.shape[-1], value, low, high, *change), strict=True)))
    return pd.DataFrame(rows)


def _perplexity_change(scores: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Perplexity over the reference's, less 1: `exp` of the mean loss of log-likelihood a word."""
    change = bootstrap_ratio(reference[0] - scores[0], scores[1])
    return tuple(float(np.expm1(x)) for x in change)
