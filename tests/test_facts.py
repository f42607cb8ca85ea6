"""Facts in long texts: where they lie, and that every method is asked for the same."""

import pandas as pd
import pytest
import torch
from conftest import tiny_model

from helpers.cache import use_packed_attention
from helpers.evaluation import commands, facts
from helpers.evaluation.methods import FullPrecision, PackedMethod
from helpers.policies import FixedBits
from helpers.training.tokenizer import train_tokenizer

FILLER = ["the cat sat on the mat and the dog ran over the hill"] * 200


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(FILLER[:3] + [f"\n{n} -> {w}" for n, w in zip(facts.NAMES, facts.WORDS)], vocab_size=400)


def test_facts_lie_at_their_depths_and_nowhere_else(tokenizer):
    texts = facts.fact_texts(tokenizer, FILLER, 300, 3, 4, seed=1)
    assert [len(text.ids) for text in texts] == [300] * 3
    for text in texts:
        assert text.depths == sorted(text.depths)
        assert max(text.depths) < 0.95
        for question, answer, depth in zip(text.questions, text.answers, text.depths, strict=True):
            shown = tokenizer.decode(text.ids)
            fact = tokenizer.decode(question + answer)
            assert shown.count(fact) == 2
            assert abs(shown.index(fact) / len(shown) - depth) < 0.1
    assert texts[0].ids != texts[1].ids
    assert facts.fact_texts(tokenizer, FILLER, 300, 3, 4, seed=1) == texts
    assert facts.fact_texts(tokenizer, FILLER, 300, 3, 4, seed=2) != texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((300, 1, 0), "facts must lie between 1 and 16, got 0"),
        ((20, 1, 4), "length must leave room for 4 facts, got 20 tokens"),
        ((4000, 9, 4), "fewer than 9 texts of 4000 need"),
    ],
)
def test_what_does_not_fit_is_refused(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        facts.fact_texts(tokenizer, FILLER, *arguments)


def test_one_of_k_is_found_by_chance_and_every_method_is_asked_the_same(tokenizer):
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    texts = [(200, text) for text in facts.fact_texts(tokenizer, FILLER, 200, 6, 4)]
    methods = [FullPrecision(), PackedMethod(FixedBits(16)), PackedMethod(FixedBits(2))]
    table = facts.fact_table(model, texts, methods)
    assert list(table.columns) == list(facts.COLUMNS)
    assert len(table) == 3 * 6 * 4
    found = table.groupby("method").found.mean()
    assert 0.05 < found["full precision"] < 0.6
    full, half = (table[table.method == method.name].found.to_numpy() for method in methods[:2])
    assert (full == half).mean() > 0.9
    summary = facts.fact_summary(table)
    assert list(summary.facts) == [24] * 3
    assert (summary.found_low <= summary.found).all()
    assert (summary.found <= summary.found_high).all()


def test_the_questions_are_answered_as_by_one_forward(tokenizer):
    model = use_packed_attention(tiny_model("llama", packed=False))
    model.resize_token_embeddings(len(tokenizer))
    (text,) = facts.fact_texts(tokenizer, FILLER, 150, 1, 3)
    found = facts.found_facts(model, text, FullPrecision())
    for number, question in enumerate(text.questions):
        sums = []
        for answer in text.answers:
            ids = torch.tensor([text.ids + question + answer])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits.log_softmax(-1)[0, -len(answer) - 1 : -1]
            sums.append(log_p.gather(-1, torch.tensor(answer)[:, None]).sum().item())
        assert found[number] == (max(range(3), key=sums.__getitem__) == number)


def test_the_command_writes_a_row_a_fact_and_method(tmp_path, capsys):
    path = tmp_path / "texts.txt"
    path.write_text("\n\n".join(FILLER), encoding="utf-8")
    options = commands.FactsOptions(
        texts=str(path), lengths=(200,), counts=(2,), bits=(4,), policy=("rule", "compact"), out=str(tmp_path / "f.csv")
    )
    commands.facts(options)
    table = pd.read_csv(tmp_path / "f.csv")
    assert len(table) == 4 * 2 * 4
    assert "static 4-bit" in capsys.readouterr().out
    with pytest.raises(ValueError, match="counts must be one for each of 3 lengths, got 2"):
        commands.facts(commands.FactsOptions(counts=(1, 2)))
