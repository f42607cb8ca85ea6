"""Several prompts gated at once: token for token what each gets by itself."""

import math

import pytest
import torch
from conftest import tiny_config
from test_gate import PROMPTS, make_model, make_tokenizer, same
from transformers import AutoModelForCausalLM, DynamicCache

from helpers.gate.batch import gated_generate_batch, gated_texts
from helpers.gate.correction import measure_usage
from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.generation import gated_generate
from helpers.gate.rows import RowReader, reads_rows
from helpers.gate.text import LARGE, SMALL
from helpers.policies import CachedModel

TEXTS = [*PROMPTS, "her friend sat", "the", "a big red dog ran to the barn and sat on the mat with the cat"]
GATES = {
    "entropy": EntropyGate(7.66),
    "rollback": EntropyGate(7.66, rollback=6.0),
    "random": EntropyGate(0.7, "random", seed=3),
    "oracle": EntropyGate(0.0, "oracle"),
    "never": EntropyGate(math.inf),
    "always": EntropyGate(-math.inf),
}


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    return make_model(tokenizer, 0), make_model(tokenizer, 1), tokenizer


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", GATES)
def test_a_batch_writes_what_each_prompt_gets_by_itself(pair, name, temperature):
    results = gated_generate_batch(*pair, TEXTS, GATES[name], 24, temperature=temperature, seed=5)
    for text, result in zip(TEXTS, results, strict=True):
        alone = gated_generate(*pair, text, GATES[name], 24, temperature=temperature, seed=5)
        same(result, alone)
        assert result.large_calls == alone.large_calls
        assert 0 < result.first_token_seconds <= result.seconds
    usage = sum(result.authors.count(LARGE) for result in results) / sum(len(result.authors) for result in results)
    assert {"never": usage == 0, "always": usage == 1}.get(name, usage > 0)
    assert bool(sum(result.rollbacks for result in results)) == (name == "rollback")


def test_texts_that_have_ended_leave_the_batch(pair):
    small = pair[0]
    open_ended = gated_generate_batch(*pair, TEXTS, GATES["random"], 24)
    end = open_ended[0].token_ids[3]
    small.generation_config.eos_token_id = end
    try:
        results = gated_generate_batch(*pair, TEXTS, GATES["random"], 24)
        lengths = [len(result.token_ids) for result in results]
        assert lengths[0] <= 4
        assert len(set(lengths)) > 1
        for text, result in zip(TEXTS, results, strict=True):
            same(result, gated_generate(*pair, text, GATES["random"], 24))
        through = gated_generate_batch(*pair, TEXTS, GATES["random"], 24, stop_at_end=False)
        assert [result.token_ids for result in through] == [result.token_ids for result in open_ended]
    finally:
        small.generation_config.eos_token_id = None


def test_the_large_model_reads_only_the_texts_where_the_gate_fires(pair, monkeypatch):
    _, large, _ = pair
    calls = []
    hook = large.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    results = gated_generate_batch(*pair, TEXTS, GATES["random"], 24)
    hook.remove()
    rows = [call["input_ids"].shape[0] for call in calls]
    assert sum(rows) == sum(result.large_calls for result in results)
    assert max(rows) > 1
    assert len(rows) < sum(rows)


def test_a_reader_of_rows_predicts_as_the_model_does_by_itself(pair):
    """In any order of rows, after tokens were taken back, and however much is left to read."""
    _, large, _ = pair
    torch.manual_seed(0)
    prompts = [torch.randint(3, 90, (n,)).tolist() for n in (9, 2, 5)]
    written = [torch.randint(3, 90, (12,)).tolist() for _ in prompts]
    reader = RowReader(large, LARGE, prompts, 12)
    for rows, count in (([2, 0], 1), ([1], 3), ([0, 1, 2], 5), ([1, 2], 8), ([0], 12)):
        logits = reader.catch_up(rows, [written[row][:count] for row in rows], keep=2)
        for row, found in zip(rows, logits, strict=True):
            ids = torch.tensor([prompts[row] + written[row][:count]])
            expected = CachedModel(large, DynamicCache(config=large.config)).read(ids, 2)[0]
            n = min(2, reader.lengths[row])
            assert torch.allclose(found[-1:], expected[-1:], atol=1e-9)
            assert reader.unread(row, written[row][:count]) == 0
            assert n == 2
    reader.take_back(0, 4)
    written[0][8:] = [5, 6, 7, 8]
    expected = CachedModel(large).read(torch.tensor([prompts[0] + written[0]]), 4)[0]
    assert torch.allclose(reader.catch_up([0], [written[0]], keep=4)[0], expected, atol=1e-9)


def test_texts_are_written_together_only_where_that_can_be(pair, monkeypatch):
    together = []
    monkeypatch.setattr(
        "helpers.gate.batch.gated_generate_batch",
        lambda *args, **settings: together.append(len(args[3])) or gated_generate_batch(*args, **settings),
    )
    gate = GATES["random"]
    results = gated_texts(*pair, TEXTS, gate, 8, batch=4)
    assert together == [4, 2]
    for text, result in zip(TEXTS, results, strict=True):
        same(result, gated_generate(*pair, text, gate, 8))
    gated_texts(*pair, TEXTS, gate, 8, large_cache=lambda model: DynamicCache(config=model.config))
    gated_texts(*pair, TEXTS, OnlineTracker(0.5, "random"), 8)
    assert together == [4, 2]
    usage, signals = measure_usage(*pair, TEXTS, gate, 8)
    assert usage == sum(result.usage for result in results) / len(results)
    assert signals.tolist() == [value for result in results for value in result.signal]


def test_models_with_windows_are_written_one_by_one(pair):
    small, _, tokenizer = pair
    config = tiny_config("gemma3_text")
    config.vocab_size = len(tokenizer)
    windowed = AutoModelForCausalLM.from_config(config).double().eval()
    windowed.generation_config.eos_token_id = None
    assert reads_rows(small)
    assert not reads_rows(windowed)
    with pytest.raises(ValueError, match="gemma3_text has others: write one text at a time with gated_generate"):
        gated_generate_batch(small, windowed, tokenizer, TEXTS, GATES["random"], 8)
    results = gated_texts(small, windowed, tokenizer, TEXTS[:2], GATES["random"], 8)
    for text, result in zip(TEXTS, results, strict=False):
        same(result, gated_generate(small, windowed, tokenizer, text, GATES["random"], 8))


def test_a_batch_refuses_what_it_cannot_write(pair):
    for prompts in ([], "the cat"):
        with pytest.raises(ValueError, match="prompts must be a list of one or more texts"):
            gated_generate_batch(*pair, prompts, GATES["random"], 8)
    with pytest.raises(ValueError, match=f"does not fit into the context of the {SMALL} model"):
        gated_generate_batch(*pair, ["the cat", "the cat " * 400], GATES["random"], 8)
