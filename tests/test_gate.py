"""The gate: its loop against a reference without caches, its calibration, its report."""

import json
import math
import re
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_config
from matplotlib import pyplot as plt
from reference_gate import reference_gated_generate
from transformers import AutoModelForCausalLM, DynamicCache, TextIteratorStreamer

import main
from helpers.cache.attention.dispatch import use_packed_attention
from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.plan import Step
from helpers.gate.calibration import text_signals
from helpers.gate.correction import correct_by_bisection, measure_usage
from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.generation import gated_generate
from helpers.gate.prompts import check_same_tokens, fit_prompts, prompt_ids, sample_articles
from helpers.gate.signals import SIGNALS
from helpers.gate.study.baselines import plain_generate
from helpers.gate.study.evaluation import METHODS, evaluate_caches, evaluate_gate
from helpers.gate.study.summaries import paired_intervals, speed_against_ideal, summarise_gates, summarise_methods
from helpers.gate.study.sweep import gains_over_random, sweep_gates, threshold_on_gated_text
from helpers.gate.text import LARGE, SMALL, trace
from helpers.io.paths import ROOT
from helpers.models import fingerprint
from helpers.models.loading import load_model, placement
from helpers.models.presets import PRESETS
from helpers.models.stories import load_articles, load_paragraphs
from helpers.policies.driver import PolicyDriver
from helpers.policies.features import entropy_of, log_probabilities
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.policies.schedules import AgeSchedule
from helpers.publishing import explorers, plots
from helpers.training.tokenizer import train_tokenizer

WORDS = "the cat sat on the mat and a dog ran to the big red barn with her friend".split(" ")  # noqa: SIM905
PROMPTS = ["the cat sat on the big mat", "a dog ran to her friend and the cat", "the red barn"]
TEMPLATE = "{% for m in messages %}the {{ m['content'] }} and{% endfor %}"


def make_tokenizer(words=WORDS):
    return train_tokenizer([" ".join(words)] * 3, vocab_size=300)


def make_model(tokenizer, seed, dtype=torch.float64):
    torch.manual_seed(seed)
    config = tiny_config("llama", layers=1 + seed)
    config.vocab_size, config.initializer_range = len(tokenizer), 0.08
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(dtype).eval()
    model.generation_config.eos_token_id = None
    return use_packed_attention(model)


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    return make_model(tokenizer, 0), make_model(tokenizer, 1), tokenizer


@pytest.fixture(scope="module")
def embedded():
    preset = PRESETS["embedded"]
    small, tokenizer = load_model(preset.gate_small, quiet=True)
    return small, load_model(preset.gate_large, quiet=True)[0], tokenizer


def same(result, other):
    assert result.token_ids == other.token_ids
    assert result.authors == other.authors
    assert result.signal == pytest.approx(other.signal, abs=1e-9)
    assert (result.rollbacks, result.discarded) == (other.rollbacks, other.discarded)
    assert result.text == other.text


USAGES = {0.0: (0, 0), 0.1: (0.03, 0.25), 0.5: (0.3, 0.7), 1.0: (1, 1)}


@pytest.mark.parametrize("signal", ["entropy", "max_prob", "margin", "random"])
@pytest.mark.parametrize("usage", USAGES)
def test_the_cached_gate_writes_what_the_reference_writes(pair, signal, usage):
    gate = threshold_on_gated_text(pair, PROMPTS[:2], signal, usage, 30)
    results = [gated_generate(*pair, prompt, gate, 30) for prompt in PROMPTS[:2]]
    for prompt, result in zip(PROMPTS, results):
        same(result, reference_gated_generate(*pair, prompt, gate, 30))
    low, high = USAGES[usage]
    assert low <= np.mean([result.usage for result in results]) <= high


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_at_its_ends_the_gate_is_one_model_alone(pair, temperature):
    small, large, tokenizer = pair
    for threshold, model in ((math.inf, small), (-math.inf, large)):
        result = gated_generate(*pair, PROMPTS[0], EntropyGate(threshold), 30, temperature=temperature, seed=3)
        alone = plain_generate(model, tokenizer, PROMPTS[0], 30, temperature=temperature, seed=3)
        naive = plain_generate(model, tokenizer, PROMPTS[0], 30, temperature=temperature, seed=3, use_cache=False)
        assert result.token_ids == alone.token_ids == naive.token_ids
        if not temperature:
            ids = torch.tensor([prompt_ids(tokenizer, PROMPTS[0])])
            expected = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False
            )
            assert result.token_ids == expected[0, ids.shape[1] :].tolist()


def test_the_oracle_fires_where_the_models_differ(pair):
    small, large, tokenizer = pair
    result = gated_generate(*pair, PROMPTS[0], EntropyGate(0.0, "oracle"), 40)
    same(result, reference_gated_generate(*pair, PROMPTS[0], EntropyGate(0.0, "oracle"), 40))
    assert result.token_ids == plain_generate(large, tokenizer, PROMPTS[0], 40).token_ids
    assert 0 < result.usage <= 1
    ids = prompt_ids(tokenizer, PROMPTS[0])
    for i, author in enumerate(result.authors):
        given = torch.tensor([ids + result.token_ids[:i]])
        choices = [int(model(input_ids=given).logits[0, -1].argmax()) for model in (small, large)]
        assert (author == LARGE) == (choices[0] != choices[1])


def test_the_large_model_is_idle_until_the_gate_fires(pair):
    large, tokenizer = pair[1:]
    read = []
    handle = large.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        gate = threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.2, 40)
        read.clear()
        result = gated_generate(*pair, PROMPTS[0], gate, 40)
    finally:
        handle.remove()
    fired = [i for i, author in enumerate(result.authors) if author == LARGE]
    assert 0 < len(fired) < 30
    prompt = len(prompt_ids(tokenizer, PROMPTS[0]))
    assert read == [prompt + fired[0], *np.diff(fired).tolist()]  # each token once, all pending ones in one forward
    assert result.large_calls == len(fired)


def test_text_ends_where_either_model_ends_it(pair):
    tokenizer = pair[2]
    free = gated_generate(*pair, PROMPTS[0], EntropyGate(0.0, "random"), 20)
    for which in (0, 1):
        ends = free.token_ids[7]
        models = make_model(tokenizer, 0), make_model(tokenizer, 1)
        models[which].generation_config.eos_token_id = [ends, len(tokenizer) - 1]
        gate = EntropyGate(0.0, "random")
        result = gated_generate(*models, tokenizer, PROMPTS[0], gate, 20)
        first = free.token_ids.index(ends)
        assert result.token_ids == free.token_ids[: first + 1]
        same(result, reference_gated_generate(*models, tokenizer, PROMPTS[0], gate, 20))
        longer = gated_generate(*models, tokenizer, PROMPTS[0], gate, 20, stop_at_end=False)
        assert longer.token_ids == free.token_ids


def test_sampling_repeats_with_its_seed_and_equals_the_reference(pair):
    gate = threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.4, 30, temperature=1.0)
    texts = [gated_generate(*pair, PROMPTS[0], gate, 30, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert texts[0].token_ids == texts[1].token_ids != texts[2].token_ids
    same(texts[0], reference_gated_generate(*pair, PROMPTS[0], gate, 30, temperature=1.0, seed=0))
    assert 0 < texts[0].usage < 1


class Collector:
    def __init__(self):
        self.values, self.ended = [], 0

    def put(self, value):
        self.values.append(value.tolist())

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("rollback", [None, 6.0])
def test_a_streamer_gets_the_prompt_and_then_what_stands(pair, rollback):
    collector, gate = Collector(), threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.3, 30)
    gate.rollback = rollback
    result = gated_generate(*pair, PROMPTS[0], gate, 30, streamer=collector)
    assert bool(result.rollbacks) == (rollback is not None)
    assert collector.values[0] == [prompt_ids(pair[2], PROMPTS[0])]
    assert [token for [token] in collector.values[1:]] == result.token_ids
    assert collector.ended == 1


def test_a_transformers_streamer_works_from_another_thread(embedded):
    streamer = TextIteratorStreamer(embedded[2], skip_prompt=True, skip_special_tokens=True)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            gated_generate(*embedded, "Once upon a time", EntropyGate(3.0), 20, streamer=streamer)
        )
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == results[0].text
    assert 0 < results[0].first_token_seconds < results[0].seconds


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("rollback", [0.0, 6.0, 100.0])
def test_rollback_equals_the_reference(pair, rollback, temperature):
    gate = threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.15, 25)
    gate.rollback = rollback
    for prompt in PROMPTS[:2]:
        result = gated_generate(*pair, prompt, gate, 25, temperature=temperature)
        same(result, reference_gated_generate(*pair, prompt, gate, 25, temperature=temperature))
        assert (result.rollbacks > 0) == (rollback < 100)
        if not rollback:  # nothing the small model wrote stands once it is judged
            judged = max(i for i, author in enumerate(result.authors) if author == LARGE)
            assert set(result.authors[: judged + 1]) == {LARGE}


CACHES = {
    "self-committing": lambda model: PackedKVCache(model.config, bits=16, block=4),
    "fixed": lambda model: PolicyDriver(model, PackedKVCache(model.config, block=4), FixedBits(16)),
    "schedule": lambda model: PolicyDriver(
        model, PackedKVCache(model.config, block=4), AgeSchedule(16, (Step(2, 16),))
    ),
    "rule": lambda model: PolicyDriver(model, PackedKVCache(model.config, block=4), EntropyRule((-3.0, -2.0, -1.0))),
    "reads all": lambda model: PolicyDriver(model, PackedKVCache(model.config, block=4), ReadsAll()),
}


class ReadsAll(FixedBits):
    """Stores everything in full precision, but insists on every feature."""

    needs = ("entropy", "surprisal", "rarity")

    def __init__(self):
        super().__init__(16)

    def widths(self, features, batch, tokens):
        for name in self.needs:
            assert getattr(features, name).shape == (batch, tokens)
        return super().widths(features, batch, tokens)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rollback", [None, 6.0])
def test_at_full_width_packed_caches_change_nothing(cache, rollback):
    tokenizer = make_tokenizer()
    models = make_model(tokenizer, 0, torch.float32), make_model(tokenizer, 1, torch.float32)
    gate = threshold_on_gated_text((*models, tokenizer), PROMPTS[:1], "entropy", 0.15, 50)
    gate.rollback = rollback
    plain = gated_generate(*models, tokenizer, PROMPTS[1], gate, 50)
    packed = gated_generate(
        *models, tokenizer, PROMPTS[1], gate, 50, small_cache=CACHES[cache], large_cache=CACHES[cache]
    )
    assert (packed.rollbacks > 0) == (rollback is not None)
    # 16 bits are float16: close, and equal as long as no choice is nearly a tie.
    shared = next((i for i, (a, b) in enumerate(zip(plain.token_ids, packed.token_ids)) if a != b), 50)
    assert shared >= 25
    assert packed.signal[:25] == pytest.approx(plain.signal[:25], abs=0.05)


def test_a_policy_sees_the_same_text_with_rollback_as_without(pair):
    """What the drivers hold at the end is the final text, whatever was taken back on the way."""
    made = []

    def factory(model):
        made.append(PolicyDriver(model, PackedKVCache(model.config, block=4), ReadsAll()))
        return made[-1]

    gate = threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.15, 50)
    gate.rollback = 6.0
    result = gated_generate(*pair, PROMPTS[1], gate, 50, small_cache=factory, large_cache=factory)
    assert result.rollbacks > 0
    text = prompt_ids(pair[2], PROMPTS[1]) + result.token_ids
    for driver in made:
        length = driver.cache.get_seq_length()
        assert driver.widths_so_far().shape == (1, length)
        assert driver.token_ids[0].tolist() == text[driver.cache.committed : length]
        assert torch.cat(driver.committed_ids, 1)[0].tolist() == text[: driver.cache.committed]
        logits = driver.model(input_ids=torch.tensor([text[:length]])).logits
        tail = entropy_of(log_probabilities(logits))[0, driver.cache.committed :]
        assert torch.allclose(driver.features.entropy[0], tail, atol=0.05)
    assert made[0].cache.get_seq_length() == len(text) - 1


def test_chat_templates_are_each_models_own_and_only_written_tokens_are_shared(pair):
    large, tokenizer = pair[1:]
    chat = make_tokenizer()
    chat.chat_template = TEMPLATE
    assert prompt_ids(chat, "dog") == tokenizer("the dog and", add_special_tokens=False)["input_ids"]
    gate = threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.4, 30)
    settings = {"large_tokenizer": chat}
    result = gated_generate(*pair, PROMPTS[0], gate, 30, **settings)
    same(result, reference_gated_generate(*pair, PROMPTS[0], gate, 30, **settings))
    assert result.token_ids != gated_generate(*pair, PROMPTS[0], gate, 30).token_ids
    always = gated_generate(*pair, PROMPTS[0], EntropyGate(-math.inf), 30, **settings)
    assert always.token_ids == plain_generate(large, chat, PROMPTS[0], 30).token_ids
    with pytest.raises(ValueError, match="prompt is empty"):
        prompt_ids(chat, "  ")


def test_tokenizers_that_differ_are_refused_with_the_difference(pair):
    tokenizer = pair[2]
    check_same_tokens(tokenizer, make_tokenizer())
    shorter = train_tokenizer(["abc"], vocab_size=260)
    with pytest.raises(ValueError, match=rf"has {len(tokenizer)} tokens and the large one's {len(shorter)}"):
        gated_generate(*pair, PROMPTS[0], EntropyGate(1.0), large_tokenizer=shorter)
    other = make_tokenizer(["zebra", "quick", "jumping", "over", "fences", "exactly", "vowels", "sphinx", "judge"])
    assert len(other) == len(tokenizer)
    with pytest.raises(ValueError, match=r"token '.+' is only in the (small|large) model's"):
        check_same_tokens(tokenizer, other)
    moved = make_tokenizer()
    a, b = moved.convert_ids_to_tokens([5, 6])
    vocabulary = moved.get_vocab() | {a: 6, b: 5}
    moved.get_vocab = lambda: vocabulary
    with pytest.raises(ValueError, match=r"token '.+' is number [56] in the small model's and [56] in the large one's"):
        check_same_tokens(tokenizer, moved)
    ending = make_tokenizer()
    ending.eos_token = "a"
    with pytest.raises(ValueError, match=r"texts end with '<\|endoftext\|>' in the small model's and 'a'"):
        check_same_tokens(tokenizer, ending)


def test_what_does_not_fit_is_refused_by_name(pair):
    with pytest.raises(ValueError, match=r"text of \d+ tokens and max_new_tokens=50 does not fit .* small model \(512"):
        gated_generate(*pair, "the cat " * 400, EntropyGate(1.0))
    with pytest.raises(ValueError, match="max_new_tokens must be 1 or more, got 0"):
        gated_generate(*pair, "the cat", EntropyGate(1.0), 0)
    with pytest.raises(ValueError, match="nothing to read"):
        gated_generate(*pair, "  ", EntropyGate(1.0))
    with pytest.raises(ValueError, match="temperature must be"):
        gated_generate(*pair, "the cat", EntropyGate(1.0), temperature=-1.0)
    used = DynamicCache(config=pair[0].config)
    pair[0](input_ids=torch.tensor([[3, 4]]), cache=used)
    with pytest.raises(ValueError, match="cache of the llama model must be empty"):
        gated_generate(*pair, "the cat", EntropyGate(1.0), small_cache=lambda model: used)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": math.nan}, "threshold must be a number, got NaN"),
        ({"threshold": 1.0, "signal": "mood"}, "signal must be one of entropy, .* got 'mood'"),
        ({"threshold": 1.0, "rollback": -1.0}, "rollback must be a number of bits, 0 or more, got -1.0"),
        ({"threshold": 1.0, "rollback": math.nan}, "rollback must be"),
        ({"threshold": 1.0, "rollback": 1.0, "signal": "oracle"}, "nothing to take back"),
    ],
)
def test_a_gate_refuses_what_it_cannot_mean(settings, message):
    with pytest.raises(ValueError, match=message):
        EntropyGate(**settings)


def test_signals_are_higher_where_the_model_is_less_sure():
    entropy_bits = SIGNALS["entropy"]
    sure, torn, lost = torch.tensor([9.0, 0, 0, 0]), torch.tensor([9.0, 9.0, 0, 0]), torch.zeros(4)
    for signal in ("entropy", "max_prob", "margin"):
        values = SIGNALS[signal].of(torch.stack([sure, torn, lost])).tolist()
        assert values[0] < min(values[1:])
        assert values[0] >= 0
    assert entropy_bits.of(lost) == 2.0
    assert SIGNALS["max_prob"].of(lost) == 0.75
    assert SIGNALS["margin"].of(torn) == 1.0
    assert entropy_bits.of(torch.tensor([0.0, -math.inf])) == 0
    for logits in (sure, lost, torch.tensor([0.0, -math.inf, 1.0]), torch.randn(50, dtype=torch.bfloat16)):
        assert entropy_bits.value(logits) == pytest.approx(entropy_bits.of(logits).item(), rel=1e-5)
    assert math.isnan(entropy_bits.value(torch.tensor([0.0, math.nan])))
    half = torch.randn(50, dtype=torch.bfloat16)
    assert entropy_bits.of(half).dtype == torch.float32
    nats = entropy_of(log_probabilities(half))
    assert entropy_bits.of(half).dtype == torch.float32
    assert entropy_bits.of(half).item() == pytest.approx(nats.item() / math.log(2), rel=1e-5)


TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(6)]


def test_calibration_is_the_percentile_of_the_small_models_signal(pair):
    small, _, tokenizer = pair
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    log_ps = [log_probabilities(small(input_ids=torch.tensor([i])).logits[0]) for i in ids]
    values = np.concatenate([entropy_of(log_p).detach() for log_p in log_ps]) / np.log(2)
    for percentile in (10, 50, 90):
        gate = EntropyGate.calibrate(small, tokenizer, TEXTS, percentile=percentile, progress=False)
        assert gate.threshold == pytest.approx(np.percentile(values, percentile), abs=1e-9)
        assert np.mean(values > gate.threshold) == pytest.approx(1 - percentile / 100, abs=0.02)
    assert EntropyGate.calibrate(small, tokenizer, TEXTS, target_usage=0.1, progress=False).threshold == gate.threshold
    assert EntropyGate.calibrate(small, tokenizer, TEXTS, percentile=0).threshold == -math.inf
    assert EntropyGate.calibrate(small, tokenizer, TEXTS, percentile=100).threshold == math.inf
    assert EntropyGate.calibrate(small, tokenizer, [], percentile=30, signal="random").threshold == 0.3
    assert text_signals(small, ids, "margin", progress=False).max() <= 1


def test_calibration_refuses_what_is_no_percentile(pair):
    small, _, tokenizer = pair
    for percentile in (-1, 101, math.nan):
        with pytest.raises(ValueError, match="percentile must lie between 0 and 100, got"):
            EntropyGate.calibrate(small, tokenizer, TEXTS, percentile)
    with pytest.raises(ValueError, match="target_usage must be a share"):
        EntropyGate.calibrate(small, tokenizer, TEXTS, target_usage=20)
    with pytest.raises(ValueError, match="texts: 2 given, and none"):
        EntropyGate.calibrate(small, tokenizer, ["", " "])
    with pytest.raises(ValueError, match="'oracle' is not calibrated"):
        EntropyGate.calibrate(small, tokenizer, TEXTS, signal="oracle")
    with pytest.raises(ValueError, match="got 'mood'"):
        EntropyGate.calibrate(small, tokenizer, TEXTS, signal="mood")


def test_a_threshold_is_found_again_only_for_the_same_question(pair, tmp_path, monkeypatch):
    small, large, tokenizer = pair
    runs = []
    monkeypatch.setattr(
        "helpers.gate.calibration.text_signals", lambda *args: runs.append(1) or text_signals(*args[:3], progress=False)
    )

    def ask(model=small, texts=TEXTS, **settings):
        before = len(runs)
        gate = EntropyGate.calibrate(model, tokenizer, texts, cache_dir=tmp_path, **settings)
        return gate.threshold, len(runs) > before

    threshold, computed = ask()
    assert computed
    assert ask() == (threshold, False)
    for other in ({"model": large}, {"texts": TEXTS[1:]}, {"percentile": 40}, {"signal": "margin"}):
        assert ask(**other)[1]
    assert len(list(tmp_path.iterdir())) == 5
    changed = make_model(tokenizer, 0)
    assert fingerprint(changed) == fingerprint(small)
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight += 0.1
    assert ask(model=changed)[1]
    ours = [p for p in tmp_path.iterdir() if json.loads(p.read_text())["threshold"] == threshold]
    for content in ("{half", "[]", '"text"', '{"threshold": 1.0}', b"\xff\xfe"):
        for path in ours:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        assert ask() == (threshold, True)
        assert ask() == (threshold, False)
    for path in ours:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"threshold": "NaN"}))
    assert ask() == (threshold, True)


def test_bisection_reaches_the_usage_that_calibration_misses(embedded):
    prompts = [article.article for article in load_articles(ROOT / "data/samples/openings.jsonl", "train")][:5]
    gate = EntropyGate(2.0)
    corrected = correct_by_bisection(*embedded, prompts, gate, 0.2, 30, tolerance=0.02)
    before, after = (measure_usage(*embedded, prompts, g, 30)[0] for g in (gate, corrected))
    assert abs(before - 0.2) > 0.2
    assert abs(after - 0.2) <= 0.04
    assert gate.threshold == 2.0
    assert correct_by_bisection(*embedded, prompts, gate, 0.0).threshold == math.inf
    assert correct_by_bisection(*embedded, prompts, gate, 1.0).threshold == -math.inf
    with pytest.raises(ValueError, match="target_usage must be a share"):
        correct_by_bisection(*embedded, prompts, gate, 2.0)
    with pytest.raises(ValueError, match="prompts is empty"):
        correct_by_bisection(*embedded, [], gate, 0.2)


def test_the_tracker_reaches_its_target_over_several_prompts(pair):
    tracker = OnlineTracker.follow(EntropyGate(0.0), 0.3, step=0.2)
    authors = []
    for prompt in PROMPTS * 4:
        authors += gated_generate(*pair, prompt, tracker, 40).authors
    assert tracker.threshold > 0
    assert authors[:5].count(LARGE) == 5
    assert authors[240:].count(LARGE) / len(authors[240:]) == pytest.approx(0.3, abs=0.06)
    # What was added and taken away is known exactly.
    assert tracker.threshold == pytest.approx(0.2 * (authors.count(LARGE) - 0.3 * len(authors)))
    with pytest.raises(ValueError, match="target must be a share"):
        OnlineTracker(1.0, target=3.0)
    with pytest.raises(ValueError, match="step must be"):
        OnlineTracker(1.0, step=0.0)


def test_the_random_control_fires_at_its_rate_blind_to_the_text(pair):
    gate = EntropyGate(0.7, "random")
    results = [gated_generate(*pair, prompt, gate, 50) for prompt in PROMPTS]
    assert np.mean([result.usage for result in results]) == pytest.approx(0.3, abs=0.12)
    assert results[0].authors != results[1].authors
    other = gated_generate(*pair, PROMPTS[0], EntropyGate(0.7, "random", seed=1), 50)
    assert other.authors != results[0].authors


def test_the_trace_has_a_row_a_token(pair):
    gate = threshold_on_gated_text(pair, PROMPTS[:1], "entropy", 0.3, 30)
    result = gated_generate(*pair, PROMPTS[0], gate, 30)
    table = trace(result, pair[2])
    assert table["token_id"].tolist() == result.token_ids
    assert (table["fired"] == (table["signal"] > gate.threshold)).all()
    assert table["token"].tolist() == [pair[2].decode([token]) for token in result.token_ids]
    assert set(table["author"]) == {SMALL, LARGE}


@pytest.fixture(scope="module")
def evaluated(embedded):
    articles = load_articles(ROOT / "data/samples/openings.jsonl", "test")[:3]
    prompts, references = [each.article for each in articles], [each.highlights for each in articles]
    seen = []
    table = evaluate_gate(
        embedded, prompts, references, EntropyGate(4.0), 20, repeats=2, stop_at_end=False, on_prompt=seen.append
    )
    assert [rows["prompt"].unique().tolist() for rows in seen] == [[0], [1], [2]]
    return table


def test_every_method_writes_on_every_prompt(evaluated):
    assert evaluated.groupby("prompt")["method"].apply(tuple).tolist() == [METHODS] * 3
    texts = evaluated.pivot(index="prompt", columns="method", values="text")
    for method in ("large, no cache", "assisted"):
        assert (texts[method] == texts["large"]).all()
    assert (texts["gated"] != texts["small"]).any()
    assert (evaluated["tokens"] == 20).all()
    assert (evaluated["first_token_seconds"] < evaluated["seconds"]).all()
    fidelity = evaluated.pivot(index="prompt", columns="method", values="fidelity")
    assert (fidelity["large"] == 1).all()
    assert fidelity["small"].mean() < fidelity["gated"].mean() < 1


def test_speed_is_shown_against_the_ideal(evaluated):
    table = evaluated.copy()
    for method, seconds in {"gated": 0.5, "large": 1.0, "small": 0.1}.items():
        table.loc[table["method"] == method, "seconds"] = seconds
    table.loc[table["method"] == "gated", "usage"] = 0.3
    speed = speed_against_ideal(table)
    assert speed == pytest.approx({"usage": 0.3, "cost_ratio": 0.1, "speedup": 2.0, "ideal": 2.5, "share": 0.8})
    assert summarise_methods(table)["ms_per_token"]["gated"] == pytest.approx(25)
    against = paired_intervals(table)
    assert against["speedup vs large"] == pytest.approx((2.0, 2.0, 2.0))
    assert against["fidelity"][1] <= against["fidelity"][0] <= against["fidelity"][2]
    assert against["usage"] == pytest.approx((0.3, 0.3, 0.3))


def test_evaluation_refuses_unknown_methods_and_unequal_lists(pair):
    with pytest.raises(ValueError, match=r"methods must be among .*, got magic"):
        evaluate_gate(pair, PROMPTS, PROMPTS, EntropyGate(1.0), methods=("magic",))
    with pytest.raises(ValueError, match="as many, got 3 and 1"):
        evaluate_gate(pair, PROMPTS, PROMPTS[:1], EntropyGate(1.0))


def test_a_sweep_has_a_row_for_every_signal_and_usage(pair):
    gates = sweep_gates(pair, PROMPTS[:2], list(SIGNALS), (0.0, 0.4, 1.0), 12)
    run = evaluate_gate(pair, PROMPTS[:2], PROMPTS[:2], gates, 12, methods=("gated", "large", "small"))
    table = summarise_gates(run, gates)
    table["target_usage"] = [0.0, 0.4, 1.0] * len(SIGNALS)
    assert table["signal"].tolist() == [signal for signal in SIGNALS for _ in range(3)]
    for _, rows in table.groupby("signal"):
        assert rows["usage"].is_monotonic_increasing
        assert rows["fidelity"].iloc[-1] == 1
    assert (table.loc[table["target_usage"] == 0, "usage"] == 0).all()
    shown = table[(table["target_usage"] == 0.4) & (table["signal"] != "oracle")]
    assert shown["usage"].between(0.2, 0.6).all()


@pytest.fixture(scope="module")
def several(pair):
    gates = {f"{s} {t:g}": EntropyGate(t, s) for s, t in (("entropy", 7.95), ("entropy", 7.98), ("random", 0.7))}
    table = evaluate_gate(pair, PROMPTS, PROMPTS, gates, 12, methods=("gated", "large", "small"))
    return gates, table, summarise_gates(table, gates)


def test_several_gates_take_turns_in_one_run(several, pair):
    gates, table, summary = several
    assert table["method"].tolist() == [*gates, LARGE, SMALL] * 3
    assert summary.index.tolist() == list(gates)
    for of in ("usage", "fidelity", "rougeL", "speedup"):
        assert (summary[f"{of}_low"] <= summary[of] + 1e-9).all()
        assert (summary[of] <= summary[f"{of}_high"] + 1e-9).all()
    with pytest.raises(ValueError, match="name of another method: large"):
        evaluate_gate(pair, PROMPTS, PROMPTS, {"large": EntropyGate(1.0)})


def test_gains_are_read_off_the_curves():
    rows = [
        {"prompt": i, "method": method, "tokens": 10, "usage": usage, "fidelity": fidelity}
        for i in range(4)
        for method, usage, fidelity in (
            ("small", 1.0, 0.2), ("e", 0.5, 0.8), ("r", 0.5, 0.6), ("large", 1.0, 1.0),
        )
    ]  # fmt: skip
    gains = gains_over_random(pd.DataFrame(rows), {"e": EntropyGate(1.0), "r": EntropyGate(0.5, "random")}, at=0.25)
    assert gains.loc["entropy", ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx([0.1] * 3)
    assert gains.loc["entropy", "area"] == pytest.approx(0.1, abs=0.002)


def test_both_models_may_keep_packed_caches(pair):
    dynamic, packed = lambda model: DynamicCache(config=model.config), CACHES["schedule"]
    caches = {"dynamic": (dynamic, dynamic), "large packed": (dynamic, packed), "both packed": (packed, packed)}
    table = evaluate_caches(pair, PROMPTS[:2], EntropyGate(0.5, "random"), caches, 20)
    assert table["cache"].tolist() == [*caches] * 2
    size = table.groupby("cache")["live_bytes"].sum()
    assert 0 < size["both packed"] < size["large packed"] < size["dynamic"]
    assert (table["peak_bytes"] >= table["held_bytes"]).all()
    assert (table["held_bytes"] >= table["live_bytes"]).all()


def test_the_gates_figures_and_explorer(several, pair, tmp_path):
    summary = several[2]
    result = gated_generate(*pair, PROMPTS[0], EntropyGate(0.5, "random"), 20)
    shown = trace(result, pair[2])
    values = {"read": np.linspace(0, 5, 50), "written": np.linspace(0, 4, 50)}
    figures = [
        plots.signal_distributions(values, {"frozen": 2.0}, "bits", "title", "subtitle"),
        plots.gate_trace(shown, 0.5, "title", "subtitle"),
        plots.tokens_by_author(shown["token"], shown["author"], shown["signal"], "title", "subtitle"),
        plots.against_usage(summary, "fidelity", (0.2, 1.0), "fidelity", "title", "subtitle"),
        plots.speedup_against_usage(summary, {"assisted": 1.1}, "title", "subtitle"),
    ]
    for number, figure in enumerate(figures):
        assert plots.save_figure(figure, tmp_path, f"05_{number}").stat().st_size > 5000
        plt.close(figure)
    signal, threshold, image = explorers.gate_explorer(summary).children
    before, threshold.value = image.value, 7.98
    assert image.value != before
    before, signal.value = image.value, "random"
    assert threshold.value == 0.7
    assert image.value != before


def test_gates_that_were_not_timed_have_no_times(several):
    gates, table, summary = several
    untimed = table["method"] == "random 0.7"
    table = table.assign(seconds=table["seconds"].mask(untimed))
    found = summarise_gates(table, gates)
    assert found["speedup"].isna().tolist() == [False, False, True]
    pd.testing.assert_series_equal(found["fidelity"], summary["fidelity"])
    shown = explorers.gate_at(found, "random", 0.7)
    assert "not timed" in "".join(text.get_text() for text in shown.texts)
    plt.close(shown)


def test_articles_are_cut_to_fit_and_sampled_apart(pair):
    tokenizer = pair[2]
    articles = load_articles(ROOT / "data/samples/openings.jsonl", "test")
    chosen, others = sample_articles(articles, 5, held_out=6)
    assert len(chosen) == 5
    assert len(others) == 6
    assert not set(chosen) & set(others)
    readers = [(pair[0], tokenizer), (pair[1], tokenizer)]
    prompts, cut = fit_prompts(chosen, "the {article} and", readers, 400)
    assert 0 < cut <= 5
    for prompt in prompts:
        assert prompt.startswith("the ")
        assert prompt.endswith(" and")
        assert len(prompt_ids(tokenizer, prompt)) + 400 <= 512
    with pytest.raises(ValueError, match="leaves no room"):
        fit_prompts(chosen, "{article}", readers, 510)
    with pytest.raises(ValueError, match="count must lie between 1 and the number of articles"):
        sample_articles(articles, 1000)


def test_texts_are_read_in_the_formats_of_the_real_sets(tmp_path):
    wiki = tmp_path / "wiki.txt"
    wiki.write_text(" = A Title = \n One paragraph . \n = = Section = = \n Another one . \n", encoding="utf-8")
    assert load_paragraphs(str(wiki), cut=False) == ["One paragraph .", "Another one ."]
    stories = tmp_path / "stories.txt"
    stories.write_text("One story.\nIts end.\n<|endoftext|>\nAnother.\n", encoding="utf-8")
    assert load_paragraphs(str(stories), cut=False) == ["One story.\nIts end.", "Another."]
    assert len(load_paragraphs(PRESETS["embedded"].stories)) == 57
    assert len(load_articles(PRESETS["embedded"].articles)) == 57
    wiki.write_text(" = A Title = \n", encoding="utf-8")
    with pytest.raises(ValueError, match="headings only"):
        load_paragraphs(str(wiki), cut=False)


def test_there_are_a_hundred_calibration_texts_and_none_is_a_test_prompt():
    preset = PRESETS["embedded"]
    texts = load_paragraphs(preset.calibration)
    assert len(set(texts)) == 114
    tested = load_articles(preset.articles)
    assert not set(texts) & {part for each in tested for part in (each.article, each.highlights)}


def test_a_spread_model_shows_its_map(tiny_folder):
    model, _ = load_model(tiny_folder, quiet=True, device_map="auto")
    assert placement(model) == model.device
    model.hf_device_map = {"model.embed_tokens": 0, "lm_head": 1}
    assert placement(model) == {"model.embed_tokens": 0, "lm_head": 1}
    assert load_model(tiny_folder, quiet=True, device_map="fit")[0].device.type == placement(model.model).type


NUMBER = r"\d+\.\d+"
REPORT = [
    r"Loading models\.\.\. This may take a moment, especially for the large model\.",
    r"Models loaded successfully\.",
    r"Small model \(data/models/small\) is on: \w+(:\d)?",
    r"Large model \(data/models/large\) device map: .+",
    r"",
    r"--- Calibrating entropy threshold from 'data/samples/openings\.jsonl' ---",
    r"Target percentile: 50% \(will trigger large model on the top 50% of tokens\)",
    r"Processing dataset samples to gather entropy distribution\.\.\.",
    rf"Calibration complete\. Calculated Threshold at 50th percentile: {NUMBER}",
    r"",
    r"",
    r"={57}",
    r"====== Evaluating Gated Generation on Test Prompts ======",
    r"={57}",
    *[
        line
        for i in (1, 2)
        for line in (
            r"",
            rf"--- Processing Prompt {i}/2 ---",
            rf"Gated Time: {NUMBER}s \| Large Model Time: {NUMBER}s \| Small Model Time: {NUMBER}s",
            rf"Gated ROUGE-L: {NUMBER} \| Large ROUGE-L: {NUMBER} \| Small ROUGE-L: {NUMBER}",
        )
    ],
    r"",
    r"",
    r"={57}",
    r"============== AGGREGATE PERFORMANCE METRICS ==============",
    r"={57}",
    r"Gated Method \(small \+ large\):",
    rf"  - Average Time: {NUMBER}s",
    rf"  - Average ROUGE-L Score: {NUMBER}",
    rf"  - Average Large Model Usage: {NUMBER}%",
    r"-{57}",
    r"Baseline: large Only \(Optimized with KV Cache\):",
    rf"  - Average Time: {NUMBER}s",
    rf"  - Average ROUGE-L Score: {NUMBER}",
    r"-{57}",
    r"Baseline: small Only \(Optimized with KV Cache\):",
    rf"  - Average Time: {NUMBER}s",
    rf"  - Average ROUGE-L Score: {NUMBER}",
    r"-{57}",
    r"COMPARATIVE METRICS:",
    rf"  - Speedup vs\. FAIR Baseline \(large Opt\.\): {NUMBER}x",
    rf"  - Speedup vs\. NAIVE Baseline \(large no-KV\): {NUMBER}x",
    r"={57}",
]


def test_the_report_has_the_lines_of_the_first_one_in_their_order(capsys, tmp_path):
    out = tmp_path / "gate.csv"
    options = ["--calibration-texts", "5", "--prompts", "2", "--max-new-tokens", "12", "--recalibrate"]
    assert main.main([*options, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, pattern in zip(lines, REPORT):
        assert re.fullmatch(pattern, line), (pattern, line)
    more = "\n".join(lines[len(REPORT) :])
    for name in ("assisted", "fidelity", "rougeLsum", "Ideal speed-up", "Cost ratio", "95% paired bootstrap"):
        assert name in more
    assert pd.read_csv(out)["method"].tolist() == [*METHODS] * 2
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["small"] == "data/models/small"
    assert {"threshold", "speed", "transformers"} <= about.keys()


@pytest.mark.parametrize("correct", ["bisection", "online"])
def test_the_report_can_aim_at_a_usage(capsys, correct):
    options = ["--calibration-texts", "5", "--prompts", "1", "--max-new-tokens", "4", "--target-usage", "0.25"]
    assert main.main(["gate", *options, "--correct", correct, "--recalibrate"]) == 0
    shown = capsys.readouterr().out
    assert "Target percentile: 75% (will trigger large model on the top 25% of tokens)" in shown
    assert ("Corrected on 50 other prompts for a usage of 25%" in shown) == (correct == "bisection")


def test_the_report_names_what_is_wrong(capsys, shared):
    assert main.main(["gate", "--percentile", "150"]) == 1
    assert "percentile must lie between 0 and 100, got 150" in capsys.readouterr().err
    assert main.main(["gate", "--large", str(shared / "models" / "stories3M")]) == 1
    assert "must share one tokenizer" in capsys.readouterr().err
