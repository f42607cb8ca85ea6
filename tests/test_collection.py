"""Collecting training data: the columns agreed on, interruption and resumption, checks of its own output."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_ids, tiny_model
from test_features import attention_variance

from helpers.policies.features import TokenFeatures, confidence_of, entropy_of, log_probabilities
from helpers.policies.rarity import TokenCounts
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits
from helpers.training import collection
from helpers.training.collection import collect
from helpers.training.rule import RULE_SHARES, calibrate_rule
from helpers.training.table import ASSIGNMENT_COLUMNS, COLUMNS, check_training_data, read_training_data, summarise

RULE = EntropyRule((3.9, 4.1, 4.25))
TIMES = ["latency"]


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def texts():
    return [random_ids(1, tokens, seed=tokens)[0].tolist() for tokens in (30, 22, 41, 5)]


def test_columns_are_what_they_say(model, texts, tmp_path):
    """Under 16 bits the model computes almost what it computes in full precision, so each column can be recomputed."""
    table = collect(model, texts, tmp_path / "t.csv", FixedBits(16), block=8)
    assert list(table.columns) == COLUMNS
    assert COLUMNS[:6] == ASSIGNMENT_COLUMNS == ["entropy", "rarity", "attn_var", "kv_bits", "latency", "accuracy"]
    assert len(table) == sum(len(text) - 1 for text in texts)
    eager = tiny_model("llama", packed=False)
    eager.set_attn_implementation("eager")
    rarity = TokenCounts().rarity([token for text in texts for token in text])
    at = 0
    for text_id, text in enumerate(texts):
        with torch.no_grad():
            out = eager(input_ids=torch.tensor([text]), output_attentions=True)
        rows = table[table.text_id == text_id]
        n = len(text) - 1
        log_p = log_probabilities(out.logits)
        np.testing.assert_allclose(rows.entropy, entropy_of(log_p)[0, :n], atol=2e-3)
        np.testing.assert_allclose(rows.confidence, confidence_of(log_p)[0, :n], atol=2e-3)
        np.testing.assert_allclose(rows.attn_var, attention_variance(out.attentions[-1])[0, :n], atol=2e-3)
        np.testing.assert_allclose(rows.rarity, rarity[at : at + n], atol=1e-5)
        hits = (out.logits[0, :-1].argmax(-1) == torch.tensor(text[1:])).float()
        assert (rows.accuracy.to_numpy() == hits.numpy()).mean() > 0.95
        assert rows.token_id.tolist() == text[:-1]
        assert rows.position.tolist() == list(range(n))
        at += len(text)
    assert table.latency.nunique() > len(table) / 2  # per token, not per text


def test_widths_are_those_of_the_rule(model, texts, tmp_path):
    table = collect(model, texts, tmp_path / "t.csv", RULE, block=8)
    expected = np.array([2, 4, 8, 16])[np.searchsorted(RULE.thresholds, table.entropy, side="right")]
    assert (table.kv_bits == expected).mean() > 0.999  # the file holds six decimals
    assert table.kv_bits.nunique() > 2


def test_the_file_is_what_was_returned_and_says_where_it_is_from(model, texts, tmp_path):
    path = tmp_path / "new" / "t.csv"
    table = collect(model, texts, path, RULE, block=8, source={"model": "tiny"})
    pd.testing.assert_frame_equal(read_training_data(path), table)
    told = json.loads(path.with_suffix(".json").read_text())
    assert (told["texts"], told["rows"], told["model"], told["block"]) == (4, len(table), "tiny", 8)
    assert {"torch", "transformers", "device", "date"} <= told.keys()
    assert sorted(p.name for p in path.parent.iterdir()) == ["t.csv", "t.json"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("texts_done", [0, 1, 3])
@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on_without_losing_or_repeating(model, texts, tmp_path, monkeypatch, texts_done, torn):
    whole = collect(model, texts, tmp_path / "whole.csv", RULE, block=8)
    real, read = collection.collect_text, []

    def stopping(model, ids, rarity, text_id, *rest):
        if text_id == texts_done and not read.count("resumed"):
            raise Interrupted
        read.append(text_id)
        return real(model, ids, rarity, text_id, *rest)

    monkeypatch.setattr(collection, "collect_text", stopping)
    path = tmp_path / "t.csv"
    with pytest.raises(Interrupted):
        collect(model, texts, path, RULE, block=8)
    assert not path.exists()
    partial = tmp_path / ".t.partial.csv"
    if torn:  # a write that stopped in the middle of a text, and of a line
        with partial.open("a") as file:
            file.write("1.0,2.0,0.1,4,3.0,1.0,0.5,9,0,7\n1.0,2.0")
    read.append("resumed")
    resumed = collect(model, texts, path, RULE, block=8)
    assert read == [*range(texts_done), "resumed", *range(texts_done, 4)]
    pd.testing.assert_frame_equal(resumed.drop(columns=TIMES), whole.drop(columns=TIMES), atol=1e-5)
    assert not partial.exists()


def test_a_partial_file_of_other_settings_is_not_mixed_in(model, texts, tmp_path, monkeypatch):
    real = collection.collect_text
    monkeypatch.setattr(
        collection, "collect_text", lambda *a: (_ for _ in ()).throw(Interrupted) if a[3] == 2 else real(*a)
    )
    with pytest.raises(Interrupted):
        collect(model, texts, tmp_path / "t.csv", FixedBits(2), block=8)
    monkeypatch.setattr(collection, "collect_text", real)
    table = collect(model, texts, tmp_path / "t.csv", FixedBits(8), block=8)
    assert (table.kv_bits == 8).all()


def test_the_same_run_twice_gives_the_same_table(model, texts, tmp_path):
    tables = [collect(model, texts, tmp_path / f"{i}.csv", RULE, block=8) for i in range(2)]
    pd.testing.assert_frame_equal(tables[0].drop(columns=TIMES), tables[1].drop(columns=TIMES))


def test_random_widths_survive_an_interruption(model, texts, tmp_path, monkeypatch):
    policy = RandomBits(seed=3)
    whole = collect(model, texts, tmp_path / "whole.csv", policy, block=8)
    real = collection.collect_text
    monkeypatch.setattr(
        collection, "collect_text", lambda *a: (_ for _ in ()).throw(Interrupted) if a[3] == 2 else real(*a)
    )
    with pytest.raises(Interrupted):
        collect(model, texts, tmp_path / "t.csv", policy, block=8)
    monkeypatch.setattr(collection, "collect_text", real)
    resumed = collect(model, texts, tmp_path / "t.csv", policy, block=8)
    assert resumed.kv_bits.tolist() == whole.kv_bits.tolist()
    first, second = (whole[whole.text_id == i].kv_bits.tolist()[:20] for i in (0, 1))
    assert first != second


def test_texts_that_predict_nothing_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match=r"two tokens or more; too short: text\(s\) \[1\]"):
        collect(model, [[5, 6, 7], [5]], tmp_path / "t.csv", RULE)
    with pytest.raises(ValueError, match="none given"):
        collect(model, [], tmp_path / "t.csv", RULE)


def corrupt(column, value):
    def change(table):
        table[column] = table[column].astype(object if isinstance(value, str) else float)
        table.loc[1, column] = value
        return table

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (corrupt("entropy", np.nan), "column entropy holds NaN"),
        (corrupt("entropy", -1.0), "column entropy must lie between 0 and 20"),
        (corrupt("rarity", "x"), "column rarity is not numeric"),
        (corrupt("attn_var", np.inf), "column attn_var holds NaN or infinity"),
        (corrupt("kv_bits", 3), "kv_bits must hold only"),
        (corrupt("latency", 0.0), "latency must be positive"),
        (corrupt("accuracy", 2.0), "column accuracy must lie between 0 and 1"),
        (lambda t: t.drop(columns="confidence"), "missing column.*confidence"),
        (lambda t: t[["rarity", "entropy", *COLUMNS[2:]]], "the first columns must be"),
        (lambda t: t.iloc[:0], "no rows"),
    ],
)
def test_faulty_tables_are_found(model, texts, tmp_path, change, message):
    table = collect(model, texts[:1], tmp_path / "t.csv", RULE, block=8)
    with pytest.raises(ValueError, match=message):
        check_training_data(change(table.copy()))


def test_a_missing_table_names_the_notebook_that_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_data_collection"):
        read_training_data(tmp_path / "controller_training.csv")


def test_the_summary_has_the_agreed_parts(model, texts, tmp_path):
    text = summarise(collect(model, texts, tmp_path / "t.csv", RULE, block=8))
    for part in ("Overall Summary (mean)", "Distribution Stats (std, min, max)", "Feature Correlations"):
        assert f"=== {part} ===" in text


def test_thresholds_of_the_rule_are_quantiles(model, texts, tmp_path):
    texts = [random_ids(1, 200, seed=seed)[0].tolist() for seed in range(3)]
    rule = calibrate_rule(model, texts)
    widths = []
    for ids in texts:
        entropy = entropy_of(log_probabilities(model(input_ids=torch.tensor([ids])).logits))
        widths.append(rule.widths(TokenFeatures(entropy=entropy), 1, len(ids)).flatten())
    shares = [(torch.cat(widths) == bits).float().mean().item() for bits in (2, 4, 8, 16)]
    assert shares == pytest.approx(RULE_SHARES, abs=0.02)
    assert calibrate_rule(model, texts, (0.25,) * 4).thresholds[1] < rule.thresholds[1]
    rule.save(tmp_path, {"model": "tiny"})
    assert EntropyRule.load(tmp_path) == rule
    assert json.loads((tmp_path / "rule.json").read_text())["model"] == "tiny"
    for broken in ("", "{}", '{"thresholds": [1, 2]}', '{"thresholds": [3, 2, 1]}', '{"thresholds": "abc"}'):
        (tmp_path / "rule.json").write_text(broken)
        with pytest.raises(ValueError, match="holds no thresholds of a rule"):
            EntropyRule.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="notebook 01 or python main"):
        EntropyRule.load(tmp_path / "none")
    for shares in ((0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (1.0, 0.0, 0.0, 0.0)):
        with pytest.raises(ValueError, match="shares must be four positive numbers that sum to 1"):
            calibrate_rule(model, texts, shares)
    with pytest.raises(ValueError, match="texts must have tokens"):
        calibrate_rule(model, [[]])
