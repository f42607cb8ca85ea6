"""The comparison: every method through the same measures, multiple choice through the cache, and the command."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_ids, tiny_model
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import main
from helpers.cache.accounting import code_bits, stored_bytes
from helpers.cache.attention.dispatch import use_packed_attention
from helpers.cache.plan import Step
from helpers.cache.rotary import rotary_of
from helpers.evaluation.comparison import compare_methods, standard_pairs
from helpers.evaluation.key_bias import biased_keys
from helpers.evaluation.latency import LATENCY, controller_share, time_decoding
from helpers.evaluation.length import against_length, follow_text
from helpers.evaluation.methods import FullPrecision, Group, PackedMethod, StockQuantized, stock_methods
from helpers.evaluation.multiple_choice import ending_log_likelihoods, read_endings, score_items
from helpers.models.items import MultipleChoice, load_multiple_choice
from helpers.policies.cached_model import CachedModel
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.policies.schedules import AgeSchedule
from helpers.publishing import explorers
from helpers.training.tokenizer import train_tokenizer

LONG = "The cat sat on the mat and a very big old house is up. " * 4
ITEM = MultipleChoice(LONG.strip(), ("The cat is up.", "A house sat.", "Old."), 0)


@pytest.fixture(scope="module")
def model_and_tokenizer():
    tokenizer = train_tokenizer(["The cat sat on the mat. A very big old house is up."] * 3, vocab_size=280)
    model = tiny_model("llama")
    torch.manual_seed(0)
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


@pytest.fixture(scope="module")
def comparison(model_and_tokenizer):
    static = [PackedMethod(FixedBits(16)), PackedMethod(FixedBits(4)), PackedMethod(FixedBits(4), quantizer="minmax")]
    schedules = [PackedMethod(AgeSchedule(8, (Step(1, 2, keep=0.25),), r)) for r in ("random", "attention x error")]
    groups = [
        Group("full precision", [FullPrecision()]),
        Group("static", static),
        Group("rule", [PackedMethod(EntropyRule((1.0, 2.0, 3.0)))], random_control=True),
        Group("schedule", schedules, chooses_endings=False),
    ]
    ids = random_ids(5, 96)
    return compare_methods(*model_and_tokenizer, ids, [ITEM] * 3, groups, first=32, rounds=1, batch=2)


def test_one_row_a_method_with_everything(comparison):
    table = comparison.table.set_index("method")
    assert len(table) == 8
    assert "random as rule-based dynamic" in table.index
    assert table.kl["full precision"] == pytest.approx(0, abs=1e-6)
    assert table.kl["static 16-bit"] < 1e-4 < table.kl["static 4-bit"]
    assert table.accuracy_change["full precision"] == 0
    # The state that the last token saw: 80 tokens committed, 16 in the tail.
    assert table.code_bits["static 4-bit"] == pytest.approx((76 * 4 + 20 * 16) / 96)  # sinks are at 16
    assert table.live_bytes["static 4-bit"] < table.live_bytes["static 16-bit"] < table.live_bytes["full precision"]
    assert (table.held_bytes >= table.live_bytes).all()
    assert table.stored_bits["full precision"] == pytest.approx(32)
    assert table.stored_bits.to_numpy() == pytest.approx(8 * table.held_bytes.to_numpy() / (96 * 2 * 2 * 2 * 32))
    # Peak: a prompt of 32 tokens and 64 more, of every cache; full precision makes its last layer anew at each token.
    full = 2 * 2 * 2 * 32 * 4 * 96
    assert full < table.peak_bytes["full precision"] <= 1.5 * full
    assert (table.peak_bytes >= table.live_bytes).all()
    assert (table.latency_low <= table.latency_ms).all()
    chosen = [name for name in table if name.startswith("acc_") or name == "acc"]
    assert not table.drop(columns=chosen).isna().any().any()
    changes = table["acc_norm_change"].dropna()
    assert changes.to_numpy() == pytest.approx((table["acc_norm"] - table["acc_norm"]["full precision"]).dropna())
    assert (table["acc_change_low"].dropna() <= table["acc_change_high"].dropna()).all()
    assert table["acc"].isna().tolist() == [group == "schedule" for group in table.group]


def test_random_control_has_the_histogram_of_what_it_controls(comparison):
    table = comparison.table.set_index("method")
    assert table.code_bits["random as rule-based dynamic"] == pytest.approx(
        table.code_bits["rule-based dynamic"], abs=0.8
    )


def test_paired_differences(comparison):
    pair = comparison.paired("static 4-bit", "static 16-bit")
    values = comparison.texts.pivot(index="sequence", columns="method", values="kl")
    assert pair["difference"] == pytest.approx((values["static 4-bit"] - values["static 16-bit"]).mean())
    assert 0 < pair["low"] < pair["difference"] < pair["high"]
    assert comparison.paired("static 4-bit", "static 4-bit", "acc")["difference"] == 0
    with pytest.raises(ValueError, match="no method 'static 5-bit'"):
        comparison.paired("static 5-bit", "static 4-bit")
    pairs = standard_pairs(comparison)
    assert {"kl", "accuracy", "acc"} == set(pairs["of"])
    assert ("rule-based dynamic", "random as rule-based dynamic") in set(zip(pairs.method, pairs.against, strict=True))


def test_multiple_choice_through_a_cache_that_loses_nothing(model_and_tokenizer):
    plain, lengths = ending_log_likelihoods(*model_and_tokenizer, ITEM)
    for method in (FullPrecision(), PackedMethod(FixedBits(16))):
        through, same = ending_log_likelihoods(*model_and_tokenizer, ITEM, method)
        assert through == pytest.approx(plain, abs=0.02)
        assert same.tolist() == lengths.tolist()
    rough, _ = ending_log_likelihoods(*model_and_tokenizer, ITEM, PackedMethod(FixedBits(2)))
    assert np.abs(rough - plain).max() > 0.02, "the second pass must read what was quantized"


def test_one_token_endings_need_noread_endings(model_and_tokenizer):
    model, _ = model_and_tokenizer
    logits = read_endings(CachedModel(model), torch.tensor([[5], [6]]))
    assert logits.shape == (2, 0, model.config.vocab_size)
    assert score_items(*model_and_tokenizer, [ITEM], PackedMethod(FixedBits(4))).shape == (1, 2)


def test_other_schemas_are_read(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text(
        '{"question_stem": "Predators eat", "choices": {"text": ["lions", "bunnies"], "label": ["A", "B"]}, '
        '"answerKey": "B"}\n'
        '{"question": "What is up?", "choices": {"text": ["sky", "sea", "mud"], "label": ["1", "2", "3"]}, '
        '"answerKey": "1"}\n'
    )
    book, arc = load_multiple_choice(str(path))
    assert (book.context, book.endings, book.label) == ("Predators eat", ("lions", "bunnies"), 1)
    assert (arc.context, arc.label) == ("Question: What is up?\nAnswer:", 0)
    path.write_text('{"question": "What?", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "E"}\n')
    with pytest.raises(ValueError, match="answerKey 'E' is none of its choices"):
        load_multiple_choice(str(path))


def test_real_items_of_another_set(shared):
    items = load_multiple_choice(str(shared / "data/openbook_qa_test.jsonl"))
    assert len(items) > 400
    assert {len(item.endings) for item in items} == {4}


def test_timing_and_lengths(model_and_tokenizer):
    model, _ = model_and_tokenizer
    methods = [FullPrecision(), PackedMethod(FixedBits(4))]
    times = time_decoding(model, random_ids(1, 60)[0], methods, rounds=2, prompt=32, steps=16)
    assert list(times) == ["method", *LATENCY, "cuda_peak_bytes"]
    assert times.loc[0, LATENCY[3:]].tolist() == [1, 1, 1]
    assert (times.latency_ms > 0).all()
    assert (times.latency_low <= times.latency_ms).all()
    assert (times.latency_ms <= times.latency_high).all()
    lengths = against_length(model, methods, (64, 128), steps=4)
    grown = lengths.pivot(index="method", columns="tokens", values="live_bytes")
    assert grown.loc["full precision", 128] == pytest.approx(132 / 68 * grown.loc["full precision", 64])
    assert (lengths.peak_bytes >= lengths.held_bytes).all()
    assert (lengths.held_bytes >= lengths.live_bytes).all()
    share = controller_share(model, random_ids(1, 60)[0], methods[1], prompt=32, steps=16, rounds=1)
    assert 0 < share["share"] < 1


def test_a_followed_text_and_its_explorer(model_and_tokenizer, monkeypatch, capsys):
    model, _ = model_and_tokenizer
    policy = AgeSchedule(8, (Step(1, 2, keep=0.25),))
    groups = [Group("schedule", [PackedMethod(policy)]), Group("full precision", [FullPrecision()])]
    followed = follow_text(model, random_ids(1, 64)[0], groups, every=32)
    assert followed["tokens"].tolist() == [16, 32, 48, 64] * 2
    assert followed["peak_bytes"].notna().tolist() == [False, True, False, True] * 2
    assert not (followed["peak_bytes"] < followed["held_bytes"]).any()
    assert (followed["held_bytes"] >= followed["live_bytes"]).all()
    assert [np.mean(bits) for bits in followed["bits"]][4:] == [16.0] * 4
    box = explorers.width_explorer(followed, [f"t{i}" for i in range(64)])
    method, read, image = box.children
    before = image.value
    read.value = 32
    assert image.value != before
    before, method.value = image.value, "full precision"
    assert image.value != before
    monkeypatch.setenv(explorers.STATIC, "1")
    explorers.show(lambda: pytest.fail("nothing is built on paper"))
    assert "JupyterLab" in capsys.readouterr().out


def test_stock_caches_where_installed(model_and_tokenizer):
    methods = stock_methods()
    if not methods:
        pytest.skip("no backend of the stock quantized cache is installed")
    model, _ = model_and_tokenizer
    for method in methods:
        cached = method.open(model)
        for part in random_ids(1, 200).split(100, dim=1):
            cached.read(part)
        assert 0 < stored_bytes(cached.cache) < 200 * 2 * 2 * 2 * 32 * 4
        assert np.isnan(code_bits(cached.cache))
        sums, _ = ending_log_likelihoods(*model_and_tokenizer, ITEM, method)
        assert np.isfinite(sums).all()
    assert StockQuantized("quanto").name != StockQuantized("hqq").name


@pytest.mark.parametrize("method", stock_methods(), ids=lambda method: method.backend)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_stock_caches_take_an_odd_number_of_heads(method, head_dim):
    config = LlamaConfig(
        num_attention_heads=3, num_key_value_heads=3, head_dim=head_dim, hidden_size=3 * head_dim, vocab_size=97,
        num_hidden_layers=1, intermediate_size=8,
    )  # fmt: skip
    cached = method.open(use_packed_attention(LlamaForCausalLM(config).eval()))
    assert cached.read(random_ids(1, 97)).isfinite().all()


def test_train_and_compare_commands(tiny_folder, tmp_path, capsys):
    texts = tmp_path / "stories.txt"
    texts.write_text("\n<|endoftext|>\n".join(f"{i} " + "the cat sat on the mat " * 60 for i in range(40)))
    common = ["--model", str(tiny_folder), "--texts", str(texts)]
    controllers = tmp_path / "controllers"
    assert main.main(["train", *common, "--rows", "3", "--out", str(controllers)]) == 0
    assert {"imitation.safetensors", "commit.json", "settle.safetensors"} <= {p.name for p in controllers.iterdir()}
    arguments = ["--controllers", str(controllers), "--max-rows", "2", "--rounds", "0", "--out", str(tmp_path)]
    assert main.main(["compare", *common, *arguments, "--count", "1", "--length", "96"]) == 0
    table = pd.read_csv(tmp_path / "baseline_comparison_tiny.csv")
    assert {"full precision", "static 4-bit", "rule-based dynamic", "learned, imitation"} <= set(table.method)
    assert (tmp_path / "baseline_comparison_tiny_pairs.csv").is_file()
    assert "best V25% by learned score" in capsys.readouterr().out
    arguments += ["--count", "3", "--length", "256"]
    for methods, expected in (("seven", 7), ("choices", 7)):
        assert main.main(["compare", *common, *arguments, "--methods", methods, "--name", methods]) == 0
        table = pd.read_csv(tmp_path / f"{methods}.csv")
        assert len(table) == expected
        assert {"static 4-bit", "rule-based dynamic", "learned, imitation"} <= set(table.method)
        about = json.loads((tmp_path / f"{methods}.json").read_text())
        assert (about["length"], about["first"]) == (256, 128)
    assert main.main(["compare", *common, "--controllers", str(tmp_path / "none")]) == 1
    assert "run notebook 02" in capsys.readouterr().err


def test_biased_keys_carry_a_constant_that_turns():
    model, ids = tiny_model("llama"), random_ids(1, 30)
    caches = DynamicCache(), DynamicCache()
    model(ids, cache=caches[0])
    with biased_keys(model, 100.0):
        model(ids, cache=caches[1])
    added = caches[1].layers[0].keys - caches[0].layers[0].keys  # of the first layer: later ones see other states
    rotary, bias = rotary_of(model.config, 32), torch.zeros(32)
    bias[15], bias[31] = 100.0, -100.0
    expected = rotary.turn(bias, rotary.phases(torch.arange(30), 32, torch.float32))
    assert torch.allclose(added, expected.expand_as(added), atol=1e-3)
    again = DynamicCache()
    model(ids, cache=again)
    assert torch.equal(again.layers[0].keys, caches[0].layers[0].keys), "gone afterwards"
    with pytest.raises(ValueError, match="has no keys that rotary embedding turns"), biased_keys(tiny_model("gpt2"), 1):
        pass


def test_balanced_keys_are_measured_and_compared(tiny_folder, tmp_path, capsys):
    texts = tmp_path / "stories.txt"
    texts.write_text("\n<|endoftext|>\n".join(f"{i} " + "the cat sat on the mat " * 60 for i in range(40)))
    common = ["--model", str(tiny_folder), "--texts", str(texts)]
    keys = tmp_path / "keys.safetensors"
    assert main.main(["calibrate-keys", *common, "--rows", "2", "--length", "200", "--out", str(keys)]) == 0
    assert "times less harm (median of 4 heads)" in capsys.readouterr().out
    arguments = ["--methods", "coding", "--count", "0", "--max-rows", "2", "--rounds", "0", "--length", "256"]
    arguments += ["--out", str(tmp_path), "--name", "coding"]
    assert main.main(["compare", *common, *arguments, "--balance", str(keys)]) == 0
    table = pd.read_csv(tmp_path / "coding.csv").set_index("method")
    bare = "static 4-bit, no sinks, no rotary mean, no balance, no stretch"
    assert {"static 4-bit", bare, "static 2-bit, no balance, no stretch"} <= set(table.index)
    assert table.loc["static 4-bit", "held_bytes"] < 1.05 * table.loc[bare, "held_bytes"]
    pairs = pd.read_csv(tmp_path / "coding_pairs.csv")
    assert ((pairs["method"] == "static 4-bit") & (pairs["against"] == bare)).sum() == 2  # KL and accuracy
    assert main.main(["compare", *common, *arguments]) == 1
    assert "has no file of balanced keys" in capsys.readouterr().err
    biased = [*arguments, "--balance", str(keys), "--key-bias", "100", "--name", "biased"]
    assert main.main(["compare", *common, *biased]) == 0
    kl = pd.read_csv(tmp_path / "biased.csv").set_index("method")["kl"]
    assert kl["static 4-bit"] < kl[bare] < kl["static 2-bit"]
    assert main.main(["compare", *common, *arguments, "--balance", str(tmp_path / "none")]) == 1
    assert "calibrate-keys writes such a file" in capsys.readouterr().err
