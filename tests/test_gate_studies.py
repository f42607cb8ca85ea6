"""What a signal is worth over random calls, and the gate's speed at real sizes."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from test_gate import PROMPTS, WORDS, make_model, make_tokenizer

import main
from helpers.gate.correction import measure_usage
from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.gate.learned import LearnedSignal
from helpers.gate.study import benchmark as gate_benchmark
from helpers.gate.study import report as gate_report
from helpers.gate.study.baselines import plain_generate
from helpers.gate.study.benchmark import FixedShareGate, GateBenchmark
from helpers.gate.study.evaluation import evaluate_gate
from helpers.gate.study.fidelity import (
    FidelitySettings,
    cut_stories,
    fidelity_gates,
    measure_fidelity,
    summarise_fidelity,
)
from helpers.gate.study.parts import forward_times, ideal_with_prompt, parts_against_ideal, time_parts
from helpers.gate.study.sweep import gains_over_random
from helpers.gate.text import LARGE, SMALL
from helpers.io.paths import ROOT
from helpers.models.loading import load_model, placement
from helpers.models.onednn_linear import use_onednn_linear
from helpers.models.presets import PRESETS

FOLDS = tuple([" ".join(WORDS[i:] + WORDS[:i] + WORDS[::-1]) for i in range(j, 6, 2)] for j in (0, 1))
SETTINGS = FidelitySettings(
    signals=("entropy", "rollback", "oracle"), usages=(0.2, 0.5), cuts=(6, 10), random_seeds=3, max_new_tokens=10
)


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    return make_model(tokenizer, 0), make_model(tokenizer, 1), tokenizer


def test_stories_are_cut_after_whole_words():
    table = cut_stories(["one two three " * 10, "too short"], (5, 9))
    assert table[["story", "words"]].to_numpy().tolist() == [[0, 5], [0, 9]]
    assert table["prompt"][0] == "one two three one two"
    assert (table["prompt"] + " " + table["rest"]).unique().tolist() == ["one two three " * 9 + "one two three"]
    with pytest.raises(ValueError, match="none of the 1 stories is 25 words long"):
        cut_stories(["too short"], (5, 9))


def test_no_prompt_is_judged_by_thresholds_tuned_on_it(pair):
    done = []
    table, gates = measure_fidelity(pair, FOLDS, SETTINGS, progress=done.append)
    assert sum(done) == len(table)
    assert table.groupby("fold")["story"].unique().map(list).tolist() == [[0, 1, 2], [3, 4, 5]]
    names = [f"{s} {u}" for u in ("0.2", "0.5") for s in ("entropy", "rollback", "oracle")]
    names += [f"random 0.2 seed {seed}" for seed in range(3)] + ["random 0.5 seed 0"]
    assert sorted(gates[0]) == sorted(names)
    assert set(table["method"]) == {*names, SMALL, LARGE}
    for fold in (0, 1):
        tuning = cut_stories(FOLDS[1 - fold], (10,))["prompt"].tolist()
        again = fidelity_gates(pair, tuning, SETTINGS)
        assert gates[fold] == again
        usage, _ = measure_usage(*pair, tuning, again["entropy 0.5"], 10)
        assert usage == pytest.approx(0.5, abs=0.2)
    assert gates[0]["entropy 0.2"].threshold != gates[1]["entropy 0.2"].threshold
    assert gates[0]["rollback 0.2"].rollback == 6.0
    gains = summarise_fidelity(table, gates[0])
    assert gains.loc["fidelity"].index.tolist() == ["entropy", "entropy, rollback 6", "oracle"]
    assert (gains["gain_low"] <= gains["gain"]).all()


def test_seeds_of_the_control_are_averaged_and_groups_resampled_whole():
    fidelity = {"small": (0.0, 0.2), "large": (1.0, 1.0), "e": (0.5, 0.8), "r0": (0.4, 0.3), "r1": (0.6, 0.7)}
    rows = [
        {"prompt": i, "method": method, "tokens": 10, "usage": usage, "fidelity": value + 0.01 * (i // 2)}
        for i in range(6)
        for method, (usage, value) in fidelity.items()
    ]
    gates = {"e": EntropyGate(1.0)} | {f"r{seed}": EntropyGate(0.5, "random", seed=seed) for seed in (0, 1)}
    gains = gains_over_random(pd.DataFrame(rows), gates, at=0.5, groups=np.arange(6) // 2)
    assert gains.loc["entropy", ["gain", "gain_low", "gain_high"]].tolist() == pytest.approx([0.3] * 3)


def test_the_shared_prefix_ends_at_the_first_other_token(pair):
    small, large, tokenizer = pair
    table = evaluate_gate(
        pair, PROMPTS[:2], PROMPTS[:2], EntropyGate(0.7, "random"), 12, methods=("gated", "large", "small")
    ).set_index(["prompt", "method"])
    assert (table.xs("large", level=1)["shared_prefix"] == 12).all()
    for i, prompt in enumerate(PROMPTS[:2]):
        a, b = (plain_generate(model, tokenizer, prompt, 12).token_ids for model in (small, large))
        prefix = table.loc[(i, "small"), "shared_prefix"]
        assert a[:prefix] == b[:prefix]
        assert a[prefix] != b[prefix]


def test_bad_studies_are_refused():
    with pytest.raises(ValueError, match="at must be one of the usages"):
        FidelitySettings(at=0.4)
    with pytest.raises(ValueError, match="random_seeds must be 1 or more, got 0"):
        FidelitySettings(random_seeds=0)
    for wrong, message in (
        ({"pair": "gpt"}, "pair must be one of embedded, .* got 'gpt'"),
        ({"usage": 1.0}, "usage must be a share"),
        ({"rounds": 0}, "rounds must be 1 or more"),
        ({"new_tokens": 1}, "new_tokens must be 2 or more"),
        ({"dtype": "int8"}, "dtype must be float32, .* got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            GateBenchmark(**wrong)


def test_fidelity_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "f.csv"
    options = ["--stories", "1", "--cuts", "40", "--random-seeds", "1", "--max-new-tokens", "5"]
    assert main.main(["gate-fidelity", *options, "--out", str(out)]) == 0
    assert "2 prompts of 2 stories" in capsys.readouterr().out
    assert len(pd.read_csv(out)) == 2 * (3 * 7 + 2)
    gains = pd.read_csv(tmp_path / "f_gains.csv")
    assert gains["of"].unique().tolist() == ["fidelity", "shared_prefix", "rougeL"]
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["cuts"] == [40]
    assert len(about["thresholds"]) == 2


def test_the_gate_of_a_fixed_share_fires_at_it_and_the_same_way_again(pair):
    gate = FixedShareGate(usage=0.3)
    values = np.random.default_rng(0).uniform(3, 9, 4000).astype(np.float32)
    assert np.mean([gate.fires(float(value)) for value in values]) == pytest.approx(0.3, abs=0.03)
    first, second = (gated_generate(*pair, PROMPTS[0], gate, 40) for _ in range(2))
    assert first.authors == second.authors
    assert 0 < first.usage < 0.7
    assert not any(math.isnan(value) for value in first.signal)  # the entropy was computed


def test_the_parts_of_a_gated_token_add_up(pair):
    small, large = pair[:2]
    with forward_times(small=small, large=large) as times:
        result = gated_generate(*pair, PROMPTS[0], FixedShareGate(usage=0.3), 20)
    assert len(times["small"]) == 20
    assert len(times["large"]) == result.large_calls
    assert 0 < sum(times["small"]) + sum(times["large"]) < result.seconds
    assert not small._forward_hooks
    assert not small._forward_pre_hooks
    parts = time_parts(pair, PROMPTS, FixedShareGate(usage=0.3), 20, rounds=1)
    assert all(parts[name] > 0 for name in ("small", "large_prompt", "large_later", "loop"))
    assert 0.5 < parts["large_prompt_alone"] + parts["large_step_alone"] < 1.1
    assert parts["catch_up"] > -1
    speed = {"usage": 0.3, "cost_ratio": 0.25}
    table = parts_against_ideal(speed, parts)
    assert table["ideal"]["sum"] == pytest.approx(0.55)
    assert table["gated"]["sum"] == pytest.approx(
        sum(parts[n] for n in ("small", "large_prompt", "large_later", "loop"))
    )
    assert ideal_with_prompt(speed, parts) == pytest.approx(1 / (0.55 + 0.7 * parts["large_prompt_alone"]))


def test_the_benchmark_from_the_command_line(pair, tmp_path, monkeypatch, capsys):
    tokenizer = load_model(PRESETS["embedded"].gate_small, quiet=True)[1]
    models = [make_model(tokenizer, seed, torch.float32) for seed in (0, 1)]
    monkeypatch.setattr(gate_benchmark, "load_benchmark_pair", lambda settings: (*models, tokenizer))
    out = tmp_path / "b.json"
    options = ["--prompts", "2", "--new-tokens", "30", "--rounds", "1", "--out", str(out)]
    assert main.main(["gate-bench", *options]) == 0
    assert "SmolLM-135M+360M, float32, 32 + 30 tokens" in capsys.readouterr().out
    result = json.loads(out.read_text())
    speed = result["speed"]
    assert speed["ideal"] == pytest.approx(1 / (speed["cost_ratio"] + speed["usage"]))
    assert speed["share"] == pytest.approx(speed["speedup"] / speed["ideal"])
    assert speed["share_with_prompt"] > speed["share"]
    assert 0.05 < speed["usage"] < 0.5
    assert {"threads", "device"} <= result["provenance"].keys()
    assert main.main(["gate-bench", "--prompt-tokens", "1000"]) == 1
    assert "only 0 prompts have 1000 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "data" / "benchmarks").glob("gate_*.json")), ids=lambda path: path.stem)
def test_committed_benchmarks_are_whole(path):
    result = json.loads(path.read_text())
    assert result["settings"]["pair"] in path.stem
    assert 0 < result["speed"]["share"] < 1
    assert result["weights"]["small"] < result["weights"]["large"]


def test_a_large_model_may_be_spread_over_devices(monkeypatch, capsys):
    preset = PRESETS["embedded"]
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 5 else "cpu" for i in range(6)}

    def load(source, device_map=None, **settings):
        return load_model(source, device_map=places if device_map else None, **settings)

    whole = load_model(preset.gate_large, quiet=True)[0]
    monkeypatch.setattr(gate_report, "load_model", load)
    (small, tokenizer), (spread, _) = gate_report.load_gate_pair(preset.gate_small, preset.gate_large)
    assert placement(spread) == places
    assert f"Large model (data/models/large) device map: {places}" in capsys.readouterr().out
    pairs = [(small, model, tokenizer) for model in (whole, spread)]
    results = [gated_generate(*models, "Once upon a time", EntropyGate(0.5, "random"), 20) for models in pairs]
    assert results[0].token_ids == results[1].token_ids
    assert LARGE in results[0].authors


def test_onednn_layers_give_the_same_numbers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(800, 700), torch.nn.Linear(700, 8))
    model.dtype = torch.float32
    expected = {rows: model(torch.ones(1, rows, 800).cumsum(1)).detach() for rows in (1, 2, 5, 33)}
    use_onednn_linear(model)
    assert [type(layer).__name__ for layer in model] == ["OneDNNLinear", "Linear"]  # the second is small
    with torch.no_grad():
        for rows, values in expected.items():
            assert torch.allclose(model(torch.ones(1, rows, 800).cumsum(1)), values, atol=1e-4)
    model(torch.ones(1, 2, 800)).sum().backward()  # training goes the usual way
    assert model[0].weight.grad.abs().sum() > 0


def test_onednn_layers_are_for_float32_on_a_cpu():
    for dtype in (torch.float64, torch.bfloat16):
        model = torch.nn.Sequential(torch.nn.Linear(800, 700)).to(dtype)
        model.dtype = dtype
        assert type(use_onednn_linear(model)[0]) is torch.nn.Linear


def test_the_committed_gains_are_those_of_the_committed_rows():
    table = pd.read_csv(ROOT / "data" / "gate_fidelity.csv")
    about = json.loads((ROOT / "data" / "gate_fidelity.json").read_text())
    assert table.groupby("story").ngroups == 2 * about["stories"] == 114
    assert (table.groupby(["story", "words"])["method"].nunique() == len(about["thresholds"][0]) + 2).all()
    gates = {}
    for name, threshold in about["thresholds"][0].items():
        signal, rollback = name.split()[0], None
        if signal == "rollback":
            signal, rollback = "entropy", about["rollback"]
        if signal == "learned":
            signal = LearnedSignal.load(ROOT / "data" / "controllers", *embedded_pair())
        gates[name] = EntropyGate(threshold, signal, rollback)
    found = gains_over_random(table.assign(prompt=table["story"] * 1000 + table["words"]), gates, resamples=2)
    saved = pd.read_csv(ROOT / "data" / "gate_fidelity_gains.csv").set_index(["of", "signal"]).loc["fidelity"]
    assert found["gain"].to_dict() == pytest.approx(saved["gain"].to_dict(), abs=2e-4)
    assert (saved["gain_low"] > 0).all()
    assert found["over_entropy"].to_dict() == pytest.approx(saved["over_entropy"].to_dict(), abs=2e-4)
    assert found["of_oracle"].to_dict() == pytest.approx(saved["of_oracle"].to_dict(), abs=2e-3)


def embedded_pair():
    preset = PRESETS["embedded"]
    return [load_model(source, quiet=True)[0] for source in (preset.gate_small, preset.gate_large)]
