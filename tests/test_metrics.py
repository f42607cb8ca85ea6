"""ROUGE and intervals."""

import numpy as np
import pytest

from helpers.evaluation.bootstrap import bootstrap_ratio
from helpers.evaluation.rouge import ROUGE_TYPES, Rouge, rouge_scores

PREDICTIONS = ["The dogs ran home. A cat slept!", "nothing alike"]
REFERENCES = ["A cat slept. The dog ran home.", "some other words"]


def test_rouge_counts_what_is_shared():
    scores = rouge_scores(PREDICTIONS, REFERENCES)
    assert {name: round(float(score[0]), 4) for name, score in scores.items()} == {
        "rouge1": 1.0,  # "dogs" and "dog" have one stem
        "rouge2": round(5 / 6, 4),  # all pairs but the one across the sentences
        "rougeL": round(4 / 7, 4),  # the dog ran home
        "rougeLsum": 1.0,  # sentence by sentence
    }
    assert all(score[1] == 0 for score in scores.values())
    assert rouge_scores(PREDICTIONS, REFERENCES, use_stemmer=False)["rouge1"][0] == pytest.approx(6 / 7)
    with pytest.raises(ValueError, match="as many, got 2 and 1"):
        rouge_scores(PREDICTIONS, REFERENCES[:1])


def test_rouge_behind_the_usual_metric_interface():
    metric = Rouge(keep_in_memory=True)
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        metric.add_batch(predictions=[prediction], references=[reference])
    assert len(metric) == 2
    scores = rouge_scores(PREDICTIONS, REFERENCES)
    assert metric.compute() == pytest.approx({name: scores[name].mean() for name in ROUGE_TYPES})
    plain = metric.compute(predictions=PREDICTIONS, references=REFERENCES, use_stemmer=False)
    assert plain["rouge1"] < scores["rouge1"].mean()


def test_the_ratio_of_paired_measures_has_a_tighter_interval_than_its_parts():
    base = np.random.default_rng(0).uniform(1, 10, 40)
    assert bootstrap_ratio(2 * base, base) == pytest.approx((2.0, 2.0, 2.0))
    ratio, low, high = bootstrap_ratio(np.random.default_rng(1).permutation(base), base)
    assert low < ratio < high
    assert ratio == pytest.approx(1.0)
    with pytest.raises(ValueError, match="one number a text each"):
        bootstrap_ratio(np.array([]), np.array([]))
