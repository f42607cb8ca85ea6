"""The learned signal: what it reads, its training, its file, and that it knows one pair only."""

import math

import numpy as np
import pytest
import torch
from test_gate import PROMPTS, WORDS, make_model, make_tokenizer, same

import main
from helpers.gate.batch import gated_generate_batch
from helpers.gate.calibration import text_signals
from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.gate.hidden import noting_hidden
from helpers.gate.learned import (
    ABOUT_PREDICTION,
    BEST,
    BY_HAND,
    LearnedSignal,
    feature_names,
    repetition,
    signal_inputs,
    signal_of_pair,
)
from helpers.gate.prompts import prompt_ids
from helpers.gate.signals import SIGNALS
from helpers.gate.study.learned import GROUPS, caught, caught_by_signal, input_importance
from helpers.gate.training import preferences, sample_openings, save_signal, signal_examples, train_signal
from helpers.io.paths import ROOT
from helpers.models.loading import load_model
from helpers.models.presets import PRESETS

OPENINGS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(12)]


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    return make_model(tokenizer, 0), make_model(tokenizer, 1), tokenizer


@pytest.fixture(scope="module")
def examples(pair):
    return signal_examples(pair, OPENINGS, usage=0.3, new_tokens=20, batch=5)


@pytest.fixture(scope="module")
def signal(pair, examples, tmp_path_factory):
    network, _ = train_signal(examples, hidden=(16, 8), epochs=3)
    return save_signal(network, pair, tmp_path_factory.mktemp("controllers"), {"model": "tiny"})


@pytest.fixture(scope="module")
def embedded():
    preset = PRESETS["embedded"]
    small, tokenizer = load_model(preset.gate_small, quiet=True)
    return small, load_model(preset.gate_large, quiet=True)[0], tokenizer


def test_repetition_is_of_the_token_and_of_the_pair():
    assert repetition(7, [1, 2, 3]) == (0, 0)
    assert repetition(3, [1, 2, 3]) == (1, 0)
    assert repetition(1, [1, 2, 3]) == (1 / 3, 0)
    assert repetition(2, [1, 2, 5, 1]) == (1 / 3, 1)
    assert repetition(9, [9] + [0] * 200) == (0, 0)


def test_inputs_are_what_the_signals_of_these_names_say():
    torch.manual_seed(0)
    logits, hidden = 3 * torch.randn(5, 40), torch.randn(5, 4)
    texts = [[int(row.argmax())] * n for n, row in enumerate(logits)]
    inputs = signal_inputs(logits, hidden, texts)
    assert inputs.shape == (5, len(feature_names(4)))
    for i, name in enumerate(ABOUT_PREDICTION[:3]):
        assert torch.allclose(inputs[:, i], SIGNALS[name].of(logits), atol=1e-6)
    assert torch.allclose(inputs[:, 3 : 3 + BEST], logits.log_softmax(-1).sort(descending=True).values[:, :BEST])
    assert inputs[:, 3 + BEST].tolist() == [0, 1, 1, 1, 1]
    assert inputs[:, 4 + BEST].tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(inputs[:, BY_HAND:], hidden)


def test_examples_are_what_both_models_say_of_what_the_gate_wrote(pair, examples):
    small, large, tokenizer = pair
    gate = EntropyGate(0.7, "random")
    ids = prompt_ids(tokenizer, OPENINGS[7])
    written = gated_generate(*pair, OPENINGS[7], gate, 20).token_ids
    rows = examples.text_ids == 7
    assert rows.sum() == 20
    with noting_hidden(small) as hidden:
        for i in (0, 3, 19):
            given = torch.tensor([ids + written[:i]])
            own, theirs = (model(input_ids=given).logits[0, -1] for model in (small, large))
            at = np.flatnonzero(rows)[i]
            assert examples.differs[at] == float(own.argmax() != theirs.argmax())
            bits = (theirs.max() - theirs[own.argmax()]) / math.log(2)
            assert examples.bits[at].item() == pytest.approx(bits.item(), abs=1e-4)
            states = hidden.states[0, -1:]
            assert torch.allclose(examples.inputs[at], signal_inputs(own[None], states, given.tolist())[0], atol=1e-4)
    differs, bits = preferences(torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[0.0, 2.0], [3.0, 0.0]]))
    assert differs.tolist() == [0, 1]
    assert bits.tolist() == pytest.approx([0, 3 / math.log(2)])


def test_one_token_at_a_time_it_says_what_it_says_of_a_text(embedded):
    small, large, tokenizer = embedded
    signal = LearnedSignal.load(ROOT / "data" / "controllers", small, large)
    ids = prompt_ids(tokenizer, "The goose went to the pond, and the goose went to the barn. The goose went")
    whole = text_signals(small, [ids], signal, progress=False)
    assert ((whole > 0) & (whole < 1)).all()
    with noting_hidden(small) as hidden, torch.no_grad():
        logits = small(input_ids=torch.tensor([ids])).logits[0]
    for i in range(len(ids)):
        value = signal.value(logits[i].float(), None, None, hidden.states[0, i], ids[: i + 1])
        assert value == pytest.approx(whole[i], abs=1e-5)
    broken = logits[0].float().clone()
    broken[3] = math.nan
    assert math.isnan(signal.value(broken, None, None, hidden.states[0, 0], ids[:1]))


def test_it_steers_a_gate_one_text_or_several_at_a_time(pair, signal):
    gate = EntropyGate.calibrate(*pair[::2], OPENINGS, signal=signal, target_usage=0.4, progress=False)
    results = gated_generate_batch(*pair, PROMPTS, gate, 20)
    for prompt, result in zip(PROMPTS, results, strict=True):
        same(result, gated_generate(*pair, prompt, gate, 20))
    authors = [author for result in results for author in result.authors]
    assert len(set(authors)) == 2
    assert not pair[0].get_output_embeddings()._forward_pre_hooks


def test_it_is_refused_on_another_pair(pair, signal, tmp_path):
    small, large, tokenizer = pair
    other = make_model(tokenizer, 1)
    with torch.no_grad():
        other.model.embed_tokens.weight += 0.01
    with pytest.raises(ValueError, match="trained on another pair, and the large model is not that of it"):
        gated_generate(small, other, tokenizer, PROMPTS[0], EntropyGate(0.5, signal), 4)
    with pytest.raises(ValueError, match="the small model is not that of it"):
        gated_generate_batch(large, small, tokenizer, PROMPTS, EntropyGate(0.5, signal), 4)
    with pytest.raises(FileNotFoundError, match=r"no learned signal of a gate .* train-gate writes one"):
        signal_of_pair("learned", tmp_path, small, large)
    with pytest.raises(ValueError, match="belongs to a pair of models: give LearnedSignal"):
        EntropyGate(0.5, "learned")
    assert signal_of_pair("margin", tmp_path, small, large) is SIGNALS["margin"]


def test_files_of_other_kinds_are_refused(pair, embedded):
    with pytest.raises(ValueError, match="trained on another pair"):
        LearnedSignal.load(ROOT / "data" / "controllers", *pair[:2])
    signal = LearnedSignal.load(ROOT / "data" / "controllers", *embedded[:2])
    assert signal.network.hidden == (128, 64)


def test_thresholds_are_kept_by_what_the_network_is(pair, signal, examples, tmp_path):
    other, _ = train_signal(examples, hidden=(16, 8), epochs=1, seed=1)
    other = LearnedSignal(other, signal.pair)
    assert signal.identity != other.identity
    found = [
        EntropyGate.calibrate(
            *pair[::2], OPENINGS, signal=each, target_usage=0.4, cache_dir=tmp_path, progress=False
        ).threshold
        for each in (signal, other, signal)
    ]
    assert found[0] == found[2] != found[1]
    assert len(list(tmp_path.iterdir())) == 2


def test_training_finds_what_can_be_found():
    """Of a sign in the hidden state that says whether the models differ."""
    torch.manual_seed(0)
    inputs = torch.randn(4000, BY_HAND + 4)
    differs = (inputs[:, BY_HAND + 2] > 0.8).float()
    examples = type("Examples", (), {})()
    examples.inputs, examples.differs, examples.bits = inputs, differs, 2 * differs
    examples.text_ids = np.arange(4000) // 40
    network, history = train_signal(examples, hidden=(16, 8), epochs=150, patience=10)
    signal = LearnedSignal(network, ("a", "b"))
    assert history.validation[history.best] < history.validation[0]
    probability, bits = signal.expects(inputs)
    assert caught(probability.numpy(), differs.numpy(), 0.25) > 0.95
    assert np.corrcoef(bits.numpy(), 2 * differs.numpy())[0, 1] > 0.8
    table = caught_by_signal(examples, signal, 0.25)
    assert table.loc["learned", "differ"] > table.loc["entropy", "differ"] + 0.5
    assert table.loc["oracle"].tolist() == [1, 1]
    lost = input_importance(examples, signal, 0.25)
    assert lost.index.tolist() == list(GROUPS)
    assert lost.loc["the hidden state", "low"] > 40
    assert abs(lost.loc["repetition", "lost"]) < 5


def test_openings_are_sampled_and_need_a_token_to_begin_with(pair, embedded):
    openings = sample_openings(embedded, 6, seed=1, batch=4)
    assert len(openings) == len(set(openings)) == 6
    assert all(2 <= len(embedded[2](text)["input_ids"]) <= 110 for text in openings)
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no token to begin a text with: give texts"):
        sample_openings((*pair[:2], tokenizer), 2)


@pytest.mark.parametrize("texts", [True, False])
def test_it_is_trained_from_the_command_line_and_used_by_the_report(tmp_path, capsys, texts):
    options = ["--texts", str(ROOT / "data" / "samples" / "stories.jsonl")] if texts else []
    out = tmp_path / "controllers"
    assert main.main(["train-gate", "--openings", "6", "--new-tokens", "8", *options, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "tokens of 6 texts; the models differ on" in printed
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "gate.json", "gate.safetensors"]
    assert "hidden_0, hidden_127" in (out / "README.md").read_text()


def test_the_report_goes_by_the_learned_signal(capsys):
    options = ["--prompts", "2", "--max-new-tokens", "6", "--calibration-texts", "3", "--target-usage", "20"]
    assert main.main(["gate", "--signal", "learned", *options]) == 0
    printed = capsys.readouterr()
    assert "SIGNAL: learned; usage target: 20%; usage: " in printed.out
    assert "for a usage of 20%" in printed.out
    assert "deprecated" not in printed.out + printed.err
