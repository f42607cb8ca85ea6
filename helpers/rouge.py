"""ROUGE behind the usual `evaluate` interface, without the hub.

    metric = Rouge(keep_in_memory=True)
    metric.add_batch(predictions=texts, references=highlights)
    metric.compute()  # {"rouge1": ..., "rouge2": ..., "rougeL": ..., "rougeLsum": ...}

A file of its own because importing `evaluate` takes seconds.
"""

import datasets
import evaluate

from helpers.metrics import ROUGE_TYPES, rouge_scores


class Rouge(evaluate.Metric):
    """Mean ROUGE F-measures (0-1) of `metrics.rouge_scores`; `compute(use_stemmer=False)` leaves words as they are."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="ROUGE-1, -2, -L and -Lsum F-measures, averaged over texts.",
            citation="Chin-Yew Lin. ROUGE: A Package for Automatic Evaluation of Summaries. 2004.",
            inputs_description="predictions and references: lists of texts, one reference each.",
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions: list[str], references: list[str], use_stemmer: bool = True) -> dict[str, float]:
        scores = rouge_scores(predictions, references, use_stemmer)
        return {name: float(scores[name].mean()) for name in ROUGE_TYPES}
