"""Multiple choice against log-probabilities added up one by one, and the card of the embedded pair."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_model

from helpers.evaluation.multiple_choice import ending_log_likelihoods, score_items
from helpers.io.paths import ROOT
from helpers.models.items import MultipleChoice
from helpers.models.loading import load_model
from helpers.training.model_card import measure_pair, time_per_token, write_pair_card
from helpers.training.tokenizer import train_tokenizer

ITEM = MultipleChoice("The cat sat", ("on the mat.", "in a very big old house.", "up."), 1)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer(["The cat sat on the mat. A very big old house is up."] * 3, vocab_size=280)
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def one_by_one(model, tokenizer, context, ending):
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(f"{context} {ending}")["input_ids"]
    total = 0.0
    for at in range(start, len(ids)):
        log_p = model(input_ids=torch.tensor([ids[:at]])).logits[0, -1].log_softmax(-1)
        total += log_p[ids[at]].item()
    return total


def test_likelihoods_are_those_of_the_endings_alone(model_and_tokenizer):
    sums, lengths = ending_log_likelihoods(*model_and_tokenizer, ITEM)
    with torch.no_grad():
        expected = [one_by_one(*model_and_tokenizer, ITEM.context, ending) for ending in ITEM.endings]
    assert sums.tolist() == pytest.approx(expected, abs=1e-3)
    assert lengths.tolist() == [11, 24, 3]


def test_scores_are_of_the_best_sum_and_of_the_best_sum_per_byte(model_and_tokenizer):
    sums, lengths = ending_log_likelihoods(*model_and_tokenizer, ITEM)
    items = [MultipleChoice(ITEM.context, ITEM.endings, label) for label in range(3)]
    scores = score_items(*model_and_tokenizer, items)
    assert scores.acc.tolist() == [float(label == sums.argmax()) for label in range(3)]
    assert scores.acc_norm.tolist() == [float(label == (sums / lengths).argmax()) for label in range(3)]


def test_long_contexts_lose_their_beginning(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    long = MultipleChoice("The cat sat on the mat. " * 60, ITEM.endings, 0)
    assert np.isfinite(ending_log_likelihoods(model, tokenizer, long)[0]).all()


@pytest.mark.parametrize("item", [MultipleChoice(" ", ("a", "b"), 0), MultipleChoice("a", ("b", ""), 0)])
def test_empty_parts_are_refused(model_and_tokenizer, item):
    with pytest.raises(ValueError, match="needs a context and endings"):
        ending_log_likelihoods(*model_and_tokenizer, item)


def test_real_endings_are_told_from_wrong_ones(shared):
    """stories3M knows stories: it must be above chance on the project's own items."""
    from helpers.models.items import load_multiple_choice
    from helpers.models.presets import PRESETS

    model, tokenizer = load_model(shared / "models/stories3M", device="cpu", quiet=True)
    scores = score_items(model, tokenizer, load_multiple_choice(PRESETS["embedded"].multiple_choice))
    assert scores.acc.mean() > 0.33


@pytest.mark.parametrize("name", ["large", "small"])
def test_the_embedded_models_load_offline_and_write(monkeypatch, name):
    import time

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.perf_counter()
    model, tokenizer = load_model(ROOT / "data/models" / name, device="cpu", quiet=True)
    assert time.perf_counter() - started < 5
    ids = torch.tensor([tokenizer("Once upon a time")["input_ids"]])
    out = model.generate(input_ids=ids, max_new_tokens=40, do_sample=False)
    words = tokenizer.decode(out[0], skip_special_tokens=True).split()
    assert len(set(words)) > 12


def test_the_card_says_what_was_measured(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    model.config.bos_token_id = tokenizer.bos_token_id
    told = {
        "settings": {"layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32, "steps": 3},
        "parameters": 1_500_000, "tokens_seen": 2_000_000, "train_tokens": 100, "seconds": 120, "device": "a machine",
        "holdout_bits_per_byte": 3.25, "holdout_stories": 7, "threads": 2,
    }  # fmt: skip
    for name in ("large", "small"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "training.json").write_text(json.dumps(told))
    text = tmp_path / "t.txt"
    text.write_text("One cat.<|endoftext|>Two cats.")
    measured = measure_pair(tmp_path, [ITEM] * 4, str(text))
    assert len(set(measured["samples"])) == 10
    assert 0.3 < measured["time_ratio"] < 3
    assert measured["large"]["bits_per_byte"] == measured["small"]["bits_per_byte"] > 1
    write_pair_card(tmp_path, measured)
    card = (tmp_path / "README.md").read_text()
    for part in ("1.50 M", "2.0 M", "3.25", "a machine", "**Seed 9.**", "the 4\nstories"):
        assert part in card, part
    assert len(time_per_token([model], tokens=8, rounds=1)) == 1
