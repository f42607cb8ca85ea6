"""The benchmark on tiny shapes: every method runs and computes what it should, files, bars, memory that runs out."""

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_model
from matplotlib.figure import Figure
from transformers import LlamaConfig

import main
from helpers.evaluation.benchmark import measuring as benchmark
from helpers.evaluation.benchmark import runs as benchmark_runs
from helpers.evaluation.benchmark.cases import Case, Settings, plan
from helpers.evaluation.benchmark.measuring import interleave, run
from helpers.evaluation.benchmark.methods import METHODS
from helpers.evaluation.benchmark.results import (
    COLUMNS,
    benchmark_report,
    describe_machine,
    device_slug,
    load_benchmarks,
    ratio_table,
    save_benchmarks,
)
from helpers.evaluation.benchmark.runs import AttentionRun, DecodeRun, PrefillRun, fill_cache, read_bytes
from helpers.evaluation.benchmark.targets import CPU_TARGETS, CUDA_TARGETS, Target, check_targets
from helpers.evaluation.methods import FullPrecision, PackedMethod
from helpers.models import shapes
from helpers.models.shapes import SHAPES, random_model, shape_config, weight_count
from helpers.policies.rules import FixedBits
from helpers.publishing.plots.benchmark import benchmark_figure

CPU = torch.device("cpu")
TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # fmt: skip
SHARED_BY_ALL = [key for key in METHODS if key not in ("sdpa", "reference")]


@pytest.fixture
def tiny_shapes(monkeypatch):
    """Every shape is tiny, so that commands and plans can be followed in full."""
    for name in SHAPES:
        monkeypatch.setitem(shapes.SHAPES, name, TINY)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device, megabytes: 1e10)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_those_of_the_published_models(name):
    known = {"SmolLM-135M": 134_515_008, "SmolLM-360M": 361_821_120, "SmolLM-1.7B": 1_711_376_384,
             "Llama-2-7B": 6_738_415_616}  # fmt: skip
    config = shape_config(name)
    assert weight_count(config) == known[name]
    assert config.head_dim == config.hidden_size // config.num_attention_heads


def test_random_models_depend_on_the_seed_alone():
    config = LlamaConfig(**TINY, tie_word_embeddings=True)
    first, again, other = (random_model(config, seed) for seed in (0, 0, 1))
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        logits = [model(input_ids=ids).logits for model in (first, again, other)]
    assert torch.equal(logits[0], logits[1])
    assert logits[0].isfinite().all()
    assert not torch.equal(logits[0], logits[2])
    assert sum(p.numel() for p in first.parameters()) == weight_count(config)
    with pytest.raises(ValueError, match="shape must be one of SmolLM-135M"):
        shape_config("SmolLM-2B")


def _attention(key: str, tokens: int = 64, batch: int = 2, sweeps: int = 3) -> AttentionRun:
    return AttentionRun(METHODS[key](), LlamaConfig(**TINY), tokens, batch, CPU, torch.float32, 2, sweeps)


@pytest.mark.parametrize("key", [key for key in METHODS if key not in ("quanto", "hqq")])
def test_every_method_attends_to_the_same_tokens(key):
    """Caches are filled with one seed: what 16 bits or a plain cache gives, all give, up to their error."""
    run = _attention(key)
    expected = _attention("dynamic").sweep()
    outputs = run.sweep()
    assert len(outputs) == 2
    tolerance = {"2": 0.5, "4": 0.15, "balanced": 0.2, "mix": 0.4, "learned": 0.4, "reference": 0.15, "sdpa": 0.3}
    tolerance = tolerance.get(key, 0.02)
    for ours, plain in zip(outputs, expected, strict=True):
        assert ours.shape == (2, 1, 4, 32)
        error = (ours - plain).norm() / plain.norm()
        assert error < tolerance


@pytest.mark.parametrize("key", [key for key in METHODS if key not in ("quanto", "hqq")])
def test_an_attention_round_leaves_the_cache_as_it_was(key):
    run = _attention(key)
    before = run.sweep()[0]
    run.cache.crop(-1 if key != "sdpa" else 0)
    assert run.measure() > 0
    assert run.measure() > 0
    assert int(run.cache.get_seq_length()) == 64
    torch.testing.assert_close(run.sweep()[0], before)


def test_read_bytes_are_those_of_codes_and_scales():
    packed, plain = _attention("4"), _attention("dynamic")
    sides = 2 * 2 * 2  # keys and values, rows, heads
    assert read_bytes(packed.cache) == sides * (60 * (32 // 2 + 4) + 4 * 32 * 2)  # four sinks are at 16 bits
    assert read_bytes(plain.cache) == sides * 64 * 32 * 4
    assert packed.facts()["code_bits"] == (60 * 4 + 4 * 16) / 64


@pytest.mark.parametrize("tokens", [16, 40, 100])
def test_filling_commits_as_a_prompt_does(tokens, monkeypatch):
    monkeypatch.setattr(benchmark_runs, "FILL_BYTES", 2 * 2 * 32 * 4 * 2 * 32)  # portions of 32 tokens
    model = SimpleNamespace(config=LlamaConfig(**TINY), device=CPU, dtype=torch.float32)
    cached = PackedMethod(FixedBits(4)).open(model)
    fill_cache(cached, tokens, 2)
    assert cached.length == tokens
    assert cached.cache.committed == tokens // 16 * 16
    plain = FullPrecision().open(model)
    fill_cache(plain, tokens, 2)
    assert plain.length == tokens


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("key", SHARED_BY_ALL)
def test_every_method_decodes_whole_blocks(key, prompt):
    method = METHODS[key]()
    if not method.installed:
        pytest.skip(f"{key} is not installed")
    run = DecodeRun(method, tiny_model("llama"), 64, 2, rounds=2, prompt=prompt)
    assert run.measure() > 0
    assert run.measure() > 0
    assert int(run.cached.length) == 64 + 3 * 16
    facts = run.facts()
    assert facts["stored_bytes"] >= facts["live_bytes"] > 0
    assert facts["peak_bytes"] == facts["stored_bytes"]
    if run.cached.driver is not None:
        assert run.cached.cache.tail_length == 0, "a commit falls into every round"


@pytest.mark.parametrize("key", ["dynamic", "static-cache", "4", "learned"])
def test_prefill_commits_what_it_read(key):
    run = PrefillRun(METHODS[key](), tiny_model("llama"), 70, 1)
    for _ in range(2):
        assert run.measure() > 0
        assert int(run.cached.length) == 70
    assert key in ("dynamic", "static-cache") or run.cached.cache.committed == 64


class FakeRun:
    """Reports given times; raises what stands in their place."""

    def __init__(self, times):
        self.times = iter(times)

    def measure(self):
        value = next(self.times)
        if isinstance(value, Exception):
            raise value
        return value

    def facts(self):
        return {"code_bits": 4.0}


def test_running_out_of_memory_costs_one_method_only():
    errors = {
        "a": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        "b": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
        "c": MemoryError("no room"),
    }
    openers = {"good": lambda: FakeRun([9.0, 1.0, 2.0])}
    openers |= {name: lambda error=error: FakeRun([5.0, error]) for name, error in errors.items()}
    ticks = []
    found = interleave(openers, 2, True, 0, lambda: ticks.append(1))
    assert found.times == {"good": [1.0, 2.0]}, "the warm-up round does not count"
    assert found.failed.keys() == errors.keys()
    assert "good" in found.facts
    assert len(ticks) == 4 * 3


def test_only_errors_of_others_are_survived():
    openers = {"bad": lambda: FakeRun([ValueError("no compiler")]), "good": lambda: FakeRun([1.0, 2.0])}
    with pytest.raises(ValueError, match="no compiler"):
        interleave(openers, 1, True, 0, lambda: None)
    found = interleave(openers, 1, True, 0, lambda: None, foreign=["bad"])
    assert found.failed == {"bad": "no compiler"}
    assert found.times == {"good": [2.0]}


def test_runs_are_kept_open_or_opened_anew():
    for keep, count in ((True, 1), (False, 4)):
        opened = []
        interleave({"x": lambda o=opened: o.append(1) or FakeRun([1.0] * 4)}, 3, keep, 0, lambda: None)
        assert len(opened) == count


def test_a_method_without_memory_has_a_row_that_says_so(tiny_shapes, monkeypatch, capsys):
    def fails(method, *rest):
        if method.name == "static 8-bit":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return AttentionRun(method, *rest)

    monkeypatch.setattr(benchmark, "AttentionRun", fails)
    settings = Settings(("attention",), ("SmolLM-360M",), (64,), methods=("dynamic", "4", "8"), rounds=2)
    table, _ = run(settings, CPU, torch.float32, progress=False)
    rows = table.set_index("method")
    assert rows.loc["static 8-bit", "error"] == "CUDA out of memory"
    assert np.isnan(rows.loc["static 8-bit", "ms"])
    assert rows.loc["static 4-bit", "ratio"] > 0
    assert "static 8-bit left out" in capsys.readouterr().out


def test_cases_that_cannot_fit_are_left_out(tiny_shapes, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "free_memory", lambda device: 1000)
    table, _ = run(Settings(("decode", "attention"), contexts=(64,), rounds=1), CPU, torch.float32, progress=False)
    assert table.empty
    assert capsys.readouterr().out.count("left out, it needs") == 2


def test_the_plan_by_device():
    cpu, cuda = (plan(Settings(), torch.device(kind)) for kind in ("cpu", "cuda"))
    needed = {(b.kind, b.shape, b.context, b.batch) for b in CPU_TARGETS}
    assert needed <= {(c.kind, c.shape, c.context, c.batch) for c in cpu}
    needed = {(b.kind, b.shape, b.context, b.batch) for b in CUDA_TARGETS}
    assert needed <= {(c.kind, c.shape, c.context, c.batch) for c in cuda}
    assert {c.shape for c in cuda if c.kind == "decode"} == set(SHAPES)
    chosen = plan(Settings(("decode",), ("SmolLM-360M",), (512, 16384), (8,), ("dynamic", "hqq", "sdpa")), CPU)
    assert chosen == [Case("decode", "SmolLM-360M", n, 8, ("dynamic", "hqq")) for n in (512, 16384)]
    assert not any("hqq" in c.methods for c in cpu if c.context > 8192)
    assert len(plan(Settings(quick=True), CPU)) < len(cpu)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kinds": ("train",)}, "kinds must be of attention, .*got train"),
        ({"shapes": ("GPT-9",)}, "shapes must be of SmolLM-135M"),
        ({"methods": ("3",)}, "methods must be of dynamic"),
        ({"contexts": (0,)}, "contexts must be positive"),
        ({"rounds": 0}, "rounds must be 1 or more"),
    ],
)
def test_wrong_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)


def _row(method, round_ms, kind="decode", shape="SmolLM-135M", context=4096, batch=1, **more):
    row = {name: float("nan") for name in COLUMNS} | {"kind": kind, "shape": shape, "context": context, "batch": batch}
    ms = float(np.median(round_ms)) if round_ms else float("nan")
    row |= {"method": method, "round_ms": round_ms, "ms": ms, "ms_low": ms, "ms_high": ms, "dtype": "float32"}
    groups = {"DynamicCache": "full precision", "static 4-bit": "static"}
    return row | {"group": groups.get(method, "stock"), "ratio": 1.0, "error": "", **more}


def test_bars_are_computed_from_rounds():
    table = pd.DataFrame(
        [
            _row("DynamicCache", [10.0, 20.0, 40.0], peak_bytes=1000),
            _row("static 4-bit", [9.0, 21.0, 32.0], peak_bytes=300, copy_share=0.7),
            _row("stock hqq 4-bit", [30.0, 30.0, 32.0]),
            _row("static 4-bit", [1.0], context=512),
            _row("DynamicCache", [], context=512, error="out of memory"),
        ]
    )
    base = ("decode", "SmolLM-135M", 4096)
    bars = [
        Target(*base, 0.95),
        Target(*base, 0.85),
        Target(*base, 1.1, "speed-up"),
        Target(*base, 1.2, "speed-up"),
        Target(*base, 0.65, against="stock hqq 4-bit"),
        Target(*base, 0.35, "peak memory"),
        Target(*base, 0.6, "bandwidth"),
        Target(*base, 0.8, "bandwidth"),
        Target(*base, 0.65, against="stock quanto 4-bit"),
        Target("decode", "SmolLM-135M", 512, 1.05),
        Target("decode", "SmolLM-135M", 4096, 1.05, batch=8),
    ]
    checked = check_targets(table, bars)
    # Ratios of the same rounds are 0.9, 1.05, 0.8; the ratio of the medians would be 1.05.
    assert checked["measured"][:8].tolist() == pytest.approx([0.9, 0.9, 1 / 0.9, 1 / 0.9, 0.7, 0.3, 0.7, 0.7])
    assert checked["result"].tolist() == [
        "met", "missed", "met", "missed", "missed", "met", "met", "missed", *["not measured"] * 3,
    ]  # fmt: skip
    assert checked["low"][0] <= 0.9 <= checked["high"][0]
    assert (
        checked["target"][0]
        == "decode, SmolLM-135M, 4,096 tokens: static 4-bit at most 0.95 of the time of DynamicCache"
    )
    text = benchmark_report(table, checked, 10.0)
    assert "met: 0.90" in text
    assert "not measured" not in text
    assert (check_targets(pd.DataFrame(columns=COLUMNS), bars)["result"] == "not measured").all()


def test_files_hold_everything_and_are_read_again(tmp_path):
    table = pd.DataFrame(
        [_row("DynamicCache", [1.0, 2.0, 3.0], stored_bytes=5.0), _row("static 4-bit", [1.0], "prefill")]
    )
    paths = save_benchmarks(table, 12.3, {"rounds": 3}, "Intel(R) Xeon(R) CPU @ 2.80GHz", tmp_path)
    assert [p.name for p in paths] == ["intel-xeon-cpu-2-80ghz-decode.json", "intel-xeon-cpu-2-80ghz-prefill.json"]
    content = json.loads(paths[0].read_text())["runs"][0]
    assert {"device", "torch", "transformers", "threads", "date", "copy_gbs", "settings", "rows"} <= content.keys()
    assert content["rows"][0]["round_ms"] == [1.0, 2.0, 3.0]
    assert "NaN" not in paths[0].read_text()
    again = load_benchmarks(tmp_path)
    assert list(again.columns) == [*COLUMNS, "device", "threads", "date", "copy_gbs"]
    assert again["ms"].tolist() == [2.0, 1.0]
    (tmp_path / "gate_embedded.json").write_text("{}")  # a file of another benchmark
    newer = pd.DataFrame([_row("static 4-bit", [4.0]), _row("static 4-bit", [5.0], context=512)])
    save_benchmarks(newer, 12.3, {}, "Intel(R) Xeon(R) CPU @ 2.80GHz", tmp_path)
    save_benchmarks(newer.assign(ms=6.0)[:1], 12.3, {}, "Intel(R) Xeon(R) CPU @ 2.80GHz", tmp_path)
    again = load_benchmarks(tmp_path)
    assert sorted(again["ms"]) == [1.0, 2.0, 5.0, 6.0], "a later run replaces what it measured again, and only that"
    with pytest.raises(FileNotFoundError, match=r"run python main\.py bench first"):
        load_benchmarks(tmp_path / "none")
    assert device_slug("NVIDIA H200") == "nvidia-h200"


def test_the_table_of_ratios_has_a_row_a_case():
    about = {"live_bytes": 100.0, "stored_bytes": 100.0}
    rows = [
        _row("DynamicCache", [2.0], ratio=1.0, ratio_low=1.0, ratio_high=1.0, **about),
        _row("static 4-bit", [1.0], ratio=0.5, ratio_low=0.4, ratio_high=0.6, live_bytes=15.0, stored_bytes=20.0),
        _row("stock hqq 4-bit", [float("nan")], error="out of memory"),
        _row("DynamicCache", [3.0], context=512, batch=8, ratio=1.0, **about),
        _row("static 4-bit", [3.0], "prefill"),  # nothing to compare it with
    ]
    table = pd.DataFrame(rows).reindex(columns=COLUMNS).assign(device="a machine", threads=1, copy_gbs=12.3)
    ratios = ratio_table(table)
    first, second = ratios.index
    assert second.endswith("512 tokens x 8")
    assert ratios.loc[first, "4-bit"] == "0.50 [0.40, 0.60]"
    assert ratios.loc[first, "held bytes (live)"] == "0.20 (0.15)"
    assert (
        ratios.loc[first, "HQQ 4-bit"] == ratios.loc[second, "4-bit"] == ratios.loc[second, "held bytes (live)"] == ""
    )
    assert describe_machine(table).startswith("a machine, 1 thread, ")


def test_the_figure_shows_one_machine(tmp_path):
    rows = [
        _row(method, [ms * context, ms * context + 1], kind, context=context, ratio=ms)
        for method, ms in (("DynamicCache", 1.0), ("static 4-bit", 0.5))
        for kind in ("attention", "decode")
        for context in (512, 4096)
    ]
    table = pd.DataFrame(rows).assign(device="a machine", threads=2)
    figure = benchmark_figure(table)
    assert isinstance(figure, Figure)
    texts = [text.get_text() for text in figure.texts]
    assert any("a machine, 2 threads" in text for text in texts)
    assert "0.50 (attention, 4k) and 0.50 (decode, 4k)" in figure.get_suptitle()
    assert [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes] == [
        "attention of one layer", "decoding a token",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="of one machine, got a machine, b"):
        benchmark_figure(pd.concat([table, table.assign(device="b")]))


def test_the_command_measures_prints_and_writes(tiny_shapes, tmp_path, capsys):
    arguments = ["bench", "--contexts", "64", "128", "--methods", "dynamic", "4", "learned", "--rounds", "1"]
    arguments += ["--what", "attention", "decode", "prefill", "embedded", "--device", "cpu", "--out", str(tmp_path)]
    assert main.main(arguments) == 0
    table = load_benchmarks(tmp_path)
    assert set(table["kind"]) == {"attention", "decode", "prefill", "embedded"}
    assert not table[["ms", "ratio", "code_bits"]].isna().any().any()
    assert (table["ms_low"] <= table["ms_high"]).all()
    assert set(table[table["method"] == "DynamicCache"]["ratio"]) == {1.0}
    out = capsys.readouterr().out
    assert "embedded, large, 256 tokens: learned 8-4-2 at most 1.15 of the time of DynamicCache" in out
    assert "attention, SmolLM-360M, batch 1, 128 tokens" in out
    assert benchmark_figure(table).axes
