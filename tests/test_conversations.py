"""Second and tenth turns on one cache, copies of caches that share a beginning, and compiled models."""

import copy
import logging

import pytest
import torch
from conftest import left_padded, random_ids, tiny_model
from torch._dynamo.utils import counters
from transformers import DynamicCache

from helpers.cache import PackedKVCache
from helpers.evaluation import chat, commands
from helpers.evaluation.methods import PackedMethod
from helpers.policies.cached_model import CachedModel
from helpers.policies.driver import PolicyDriver
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.policies.schedules import MIDDLE_SCHEDULE, AgeSchedule
from helpers.training.tokenizer import train_tokenizer

RULE = EntropyRule((3.9, 4.1, 4.25))
POLICIES = {"fixed": FixedBits(16), "rule": RULE, "schedule": AgeSchedule(*MIDDLE_SCHEDULE)}


def converse(model, turns: int, cache, driver=None, rows: int = 1, answer: int = 5):
    """Text `[rows, tokens]` after turns of new random tokens, each answered by `generate()` on the same cache."""
    batch = left_padded([30, 22][:rows]) if rows > 1 else {"input_ids": random_ids(1, 30)}
    text, mask = batch["input_ids"], batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    for turn in range(turns):
        inputs = {"input_ids": text, "attention_mask": mask}
        processors = [] if driver is None else [driver]
        if driver is not None and driver.policy.needs:
            inputs = driver.prefill(inputs)
        text = model.generate(
            **inputs, cache=cache, logits_processor=processors, max_new_tokens=answer, do_sample=False, pad_token_id=0
        )
        said = random_ids(len(text), 1 + 7 * turn % 11, seed=100 + turn)
        mask = torch.cat([mask, mask.new_ones(len(text), text.shape[1] + said.shape[1] - mask.shape[1])], dim=1)
        text = torch.cat([text, said], dim=1)
    return text


@pytest.mark.parametrize("rows", [1, 2], ids=["one", "left-padded"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_ten_turns_without_rounding_are_those_of_the_full_cache(name, rows):
    model = tiny_model(name, dtype=torch.float64)
    expected = converse(model, 10, DynamicCache(config=model.config), rows=rows)
    cache = PackedKVCache(model.config, block=8)
    assert torch.equal(converse(model, 10, cache, rows=rows), expected)


@pytest.mark.parametrize("rows", [1, 2], ids=["one", "left-padded"])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_follow_ten_turns(policy, rows):
    model = tiny_model("llama", dtype=torch.float64)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, POLICIES[policy])
    text = converse(model, 10, cache, driver, rows)
    read = cache.get_seq_length()
    assert cache.committed >= read - 16
    assert torch.equal(driver.text, text[:, :read])
    assert driver.widths_so_far().shape == (rows, read)


def test_widths_of_a_conversation_are_those_of_the_text_read_token_by_token():
    """What a policy decides in ten turns of several tokens is what it decides when each token comes alone."""
    model = tiny_model("llama", dtype=torch.float64)
    rule = EntropyRule((3.9, 4.1, 4.25))
    drivers = [PolicyDriver(model, PackedKVCache(model.config, block=8), rule) for _ in range(2)]
    for driver in drivers:
        driver.cache.holds = False  # a prompt held at 8 bits is read a little differently from tokens that wait
    text = converse(model, 10, drivers[0].cache, drivers[0])
    read = drivers[0].cache.get_seq_length()
    alone = CachedModel(model, drivers[1].cache, drivers[1])
    for at in range(read):
        alone.read(text[:, at : at + 1])
    together, one_by_one = (driver.widths_so_far() for driver in drivers)
    assert (together[:, :24] == one_by_one[:, :24]).float().mean() > 0.9  # a stored token moves later entropies a bit
    assert len(set(together.flatten().tolist())) > 1


def test_a_text_that_was_not_read_is_refused_with_where_it_differs():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, RULE)
    ids = random_ids(1, 40)
    driver.prefill({"input_ids": ids})
    changed = ids.clone()
    changed[0, 30] = (changed[0, 30] + 1) % 90 + 3
    with pytest.raises(ValueError, match=r"first 30 are the same: take the others back with driver.crop\(9\)"):
        driver.prefill({"input_ids": changed})
    driver.crop(9)
    driver.prefill({"input_ids": changed})
    assert torch.equal(driver.text, changed[:, :-1])
    with pytest.raises(ValueError, match=r"input_ids has 2 row\(s\) and the cache 1"):
        driver.prefill({"input_ids": random_ids(2, 50)})


@pytest.mark.parametrize("policy", POLICIES)
def test_copies_share_a_beginning_and_go_on_alone(policy):
    model = tiny_model("llama", dtype=torch.float64)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, POLICIES[policy])
    before = sum(1 for _ in model.parameters())
    prefix, endings = random_ids(1, 41), [random_ids(1, 25, seed=seed) for seed in (5, 6)]
    CachedModel(model, cache, driver).read(prefix)
    branches = [copy.deepcopy((cache, driver)) for _ in endings]
    for (branch, own), ending in zip(branches, endings, strict=True):
        assert own.cache is branch
        assert own.model is model
        assert branch.config is cache.config
        alone = PackedKVCache(model.config, block=8)
        beside = CachedModel(model, alone, PolicyDriver(model, alone, POLICIES[policy]))
        beside.read(prefix)
        expected = torch.cat([beside.read(ending[:, at : at + 1]) for at in range(25)], dim=1)
        reader = CachedModel(model, branch, own)
        actual = torch.cat([reader.read(ending[:, at : at + 1]) for at in range(25)], dim=1)
        assert torch.equal(actual, expected)
    assert cache.get_seq_length() == 41
    twin = copy.deepcopy(CachedModel(model, cache, driver))
    twin.read(endings[0])
    assert (twin.length, cache.get_seq_length(), twin.model is model) == (66, 41, True)
    assert sum(1 for _ in model.parameters()) == before


def test_a_compiled_model_reads_packed_without_a_break_and_is_not_compiled_for_each_layer(caplog):
    model = tiny_model("llama", layers=10)
    ids = random_ids(1, 40)
    settings = {"max_new_tokens": 20, "do_sample": False}

    def write() -> torch.Tensor:
        return model.generate(ids, **settings, cache=PackedKVCache(model.config, bits=4, block=8))

    expected, plain = write(), model.forward
    torch.compiler.reset()
    counters.clear()
    model.forward = torch.compile(plain, backend="eager")
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(write(), expected)
    assert counters["stats"]["unique_graphs"] <= 3  # the prompt, the first token, all others
    assert not counters["graph_break"]
    assert not [record for record in caplog.records if "recompile" in record.getMessage()]
    torch.compiler.reset()


def test_a_compiled_model_with_windows_reads_what_the_plain_one_reads():
    model = tiny_model("gemma2")
    ids = random_ids(1, 60)
    settings = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings, cache=PackedKVCache(model.config, bits=4, block=8))
    torch.compiler.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    actual = model.generate(ids, **settings, cache=PackedKVCache(model.config, bits=4, block=8))
    assert torch.equal(actual, expected)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def talker():
    """A model and a tokenizer with a chat template whose turns end with the end of text."""
    tokenizer = train_tokenizer([" ".join(chat.QUESTIONS)] * 3, vocab_size=400)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}" + tokenizer.eos_token + "\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


@pytest.mark.parametrize("ends", [False, True], ids=["cut short", "ended by itself"])
def test_a_turn_adds_what_the_template_adds_and_leaves_what_was_read(talker, ends):
    _, tokenizer = talker
    first = chat.next_turn(tokenizer, [], [], "Which one?")
    assert tokenizer.decode(first) == f"[user] Which one?{tokenizer.eos_token}\n[assistant] "
    answer = tokenizer("a list of food", add_special_tokens=False)["input_ids"]
    written = first + answer + [tokenizer.eos_token_id] * ends
    messages = [{"role": "user", "content": "Which one?"}, {"role": "assistant", "content": "a list of food"}]
    second = chat.next_turn(tokenizer, written, messages, "Where?")
    assert second[: len(written)] == written
    asked = [*messages, {"role": "user", "content": "Where?"}]
    assert tokenizer.decode(second) == tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)


def test_ten_turns_cost_what_is_new_and_stray_by_the_rounding_alone(talker):
    turns = chat.write_conversation(*talker, answer_tokens=6)
    assert len(turns) == 10
    methods = [PackedMethod(FixedBits(bits), block=8) for bits in (16, 8, 2)] + [PackedMethod(RULE, block=8)]
    table = chat.chat_table(talker[0], turns, methods)
    assert len(table) == 6 * 10
    parts = dict(list(table.groupby("method", sort=False)))
    full, again = parts["full precision"], parts["full precision, all read again"]
    assert full.tokens.tolist() == again.tokens.tolist()
    assert again.read.sum() > 4 * full.read.sum()
    assert again.kl.abs().max() < 1e-6
    kl = table.groupby("method").kl.mean()
    names = [method.name for method in methods]
    assert kl[names[0]] < kl[names[1]] < 1e-3 < kl[names[2]]
    assert parts[names[2]].held_bytes.iloc[-1] < 0.5 * full.held_bytes.iloc[-1]


def test_a_model_without_a_template_is_refused():
    with pytest.raises(ValueError, match="has no chat template: choose one that was trained to talk"):
        commands.chat(commands.ChatOptions(preset="embedded"))
