"""ROUGE behind the usual `evaluate` interface, without the hub.

    metric = Rouge(keep_in_memory=True)
    metric.add_batch(predictions=texts, references=highlights)
    metric.compute()  # {"rouge1": ..., "rouge2": ..., "rougeL": ..., "rougeLsum": ...}

A file of its own because importing `evaluate` takes seconds.
"""

import re
from functools import cache, lru_cache

import datasets
import evaluate
import numpy as np


class Rouge(evaluate.Metric):
    """ROUGE F-measures (0-1) of `rouge_scores`: means, or with `compute(average=False)` a list with one a text.

    `compute(use_stemmer=False)` leaves words as they are.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-1, -2, -L and -Lsum F-measures, averaged over texts.",
            citation="Chin-Yew Lin. ROUGE: A Package for Automatic Evaluation of Summaries. 2004.",
            inputs_description="predictions and references: lists of texts, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(
        self, predictions: list[str], references: list[str], use_stemmer: bool = True, average: bool = True
    ) -> dict[str, float | list[float]]:
        scores = rouge_scores(predictions, references, use_stemmer)
        return {name: float(scores[name].mean()) if average else scores[name].tolist() for name in ROUGE_TYPES}


ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(predictions: list[str], references: list[str], use_stemmer: bool = True) -> dict[str, np.ndarray]:
    """ROUGE F-measures of each text against its reference, one array a type, by the `rouge_score` package.

    Words are compared without endings (Porter's stemmer) unless `use_stemmer` is False. For "rougeLsum" texts are cut
    into sentences at `.`, `!` and `?`. Raises `ValueError` where the numbers of texts differ.
    """
    from rouge_score.rouge_scorer import RougeScorer

    if len(predictions) != len(references):
        raise ValueError(f"predictions and references must be as many, got {len(predictions)} and {len(references)}")
    scorer = RougeScorer(list(ROUGE_TYPES), tokenizer=_tokenizer(use_stemmer))
    rows = [
        scorer.score(_one_sentence_a_line(reference), _one_sentence_a_line(prediction))
        for prediction, reference in zip(predictions, references, strict=True)
    ]
    return {name: np.array([row[name].fmeasure for row in rows]) for name in ROUGE_TYPES}


@cache
def _tokenizer(use_stemmer: bool):
    """The package's own, but for remembering what it has read: stemming is half of the work, and texts come again."""
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer)
    tokenizer.tokenize = lru_cache(maxsize=10_000)(tokenizer.tokenize)
    return tokenizer


def _one_sentence_a_line(text: str) -> str:
    return re.sub(r"([.!?][\"')\]]*)\s+", r"\1\n", text.strip())
