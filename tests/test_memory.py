"""Bytes of caches: the same for every kind, by hand where that can be done, and the targets."""

import math

import pandas as pd
import pytest
import torch
from conftest import random_ids, tiny_model

import main
from helpers.evaluation.memory import (
    COLUMNS,
    DECODED,
    EMBEDDED,
    deployment_peak,
    drive_cache,
    full_bytes,
    memory_config,
    memory_methods,
    memory_table,
)
from helpers.evaluation.memory_targets import MEMORY_TARGETS, check_memory_targets, memory_targets_text
from helpers.evaluation.methods import FullPrecision, PackedMethod, stock_methods
from helpers.evaluation.tracing import trace_cache
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.publishing.tables.memory import memory_rows
from helpers.publishing.tables.memory import memory_table as shown_table

CONFIG = memory_config(EMBEDDED)
NUMBERS = 2 * 6 * 2 * 64  # of a token, keys and values
OURS = [method for group in memory_methods() for method in group.methods if isinstance(method, PackedMethod)]


def test_full_precision_by_hand():
    measured = drive_cache(FullPrecision(), CONFIG, 100, decoded=20)
    full = NUMBERS * 4 * 120
    assert measured["held_bytes"] == measured["live_bytes"] == full_bytes(CONFIG, 120) == full
    # While the keys of the last layer are joined to the newest, they are there twice.
    assert full < measured["peak_bytes"] <= full + full // 12
    assert math.isnan(measured["counted_peak"])


@pytest.mark.parametrize("method", OURS, ids=lambda method: method.name)
def test_bytes_of_packed_caches(method):
    """What is held against what is needed, at the lengths where spare room weighs most."""
    mixed = method.policy.plan is None
    for tokens, limit in ((256, 1.25 if mixed else 1.12), (512, 1.12 if mixed else 1.06)):
        measured = drive_cache(method, CONFIG, tokens)
        assert measured["live_bytes"] <= measured["held_bytes"] <= limit * measured["live_bytes"]
        assert measured["held_bytes"] < measured["counted_peak"] <= measured["peak_bytes"]
    assert measured["held_bytes"] < 0.3 * full_bytes(CONFIG, 512 + DECODED)


def test_the_learned_cache_holds_less_than_static_four_bits():
    static, learned = (method for method in OURS if method.name.startswith(("static 4", "4-2 ")))
    held = [drive_cache(method, CONFIG, 256)["held_bytes"] for method in (static, learned)]
    assert held[1] < held[0]


def test_a_batch_with_padding_takes_as_much_a_row():
    one, four = (drive_cache(PackedMethod(FixedBits(4)), CONFIG, 256, rows) for rows in (1, 4))
    assert four["held_bytes"] == pytest.approx(4 * one["held_bytes"], rel=0.05)
    assert four["peak_bytes"] > 3 * one["peak_bytes"] / 2


def test_bytes_do_not_depend_on_the_numbers():
    for method in (FullPrecision(), OURS[0]):
        first, second = (drive_cache(method, CONFIG, 64, decoded=16, seed=seed) for seed in (0, 1))
        for name in ("held_bytes", "live_bytes"):
            assert first[name] == second[name]


@pytest.mark.parametrize("sizes", [(0, 1, 16), (64, 1, 0), (64, 0, 16)])
def test_nothing_to_read_is_refused(sizes):
    with pytest.raises(ValueError, match="must be 1 or more"):
        drive_cache(FullPrecision(), CONFIG, *sizes)


def test_what_cannot_be_measured_is_told():
    with pytest.raises(ValueError, match="too short for 4 rows"):
        drive_cache(FullPrecision(), CONFIG, 64, 4)
    with pytest.raises(ValueError, match="shape must be 'embedded large' or one of SmolLM-135M"):
        memory_config("SmolLM-9B")


def test_a_model_peaks_as_a_driven_cache_does():
    """What attention hands over counts as when keys and values are made up, whatever the policy reads."""
    model, ids = tiny_model("llama"), random_ids(1, 96)
    config = model.config
    for method in (FullPrecision(), PackedMethod(FixedBits(4))):
        driven = drive_cache(method, config, 64, decoded=32)
        assert deployment_peak(model, ids, method, 64, 32) == driven["peak_bytes"]
    assert deployment_peak(model, ids, PackedMethod(EntropyRule()), 64, 32) > 0


def test_a_trace_leaves_the_cache_as_it_was():
    cached = OURS[2].open(tiny_model("llama"))
    with trace_cache(cached.cache) as trace:
        cached.read(random_ids(1, 64))
    assert trace.peak_bytes > 0
    assert not [name for name in vars(cached.cache) if name in ("update", "commit")]
    assert all("add_received" not in vars(layer) for layer in cached.cache.layers)
    before = trace.peak_bytes
    cached.read(random_ids(1, 64))
    assert trace.peak_bytes == before


@pytest.mark.skipif(not stock_methods(), reason="no backend of the stock quantized cache is installed")
def test_stock_caches_are_traced_alike():
    for method in stock_methods():
        measured = drive_cache(method, CONFIG, 256)
        assert measured["held_bytes"] < measured["peak_bytes"] < 1.1 * full_bytes(CONFIG, 256 + DECODED)


def _row(tokens, method, group, held, live, peak, shape=EMBEDDED, batch=1):
    """A case of a cache that in full precision takes 100 bytes, 10 a layer."""
    row = {"shape": shape, "tokens": tokens, "batch": batch, "method": method, "group": group, "peak_bytes": peak}
    row |= {"held_bytes": held, "live_bytes": live, "full_bytes": 100, "layer_bytes": 10}
    return row | {f"{name}_share": row[f"{name}_bytes"] / 100 for name in ("peak", "held", "live")}


def test_targets_name_their_worst_case():
    learned = "4-2 @6, best K50% V12% by learned score"
    rows = [
        _row(4096, "static 4-bit", "static", 20.0, 19.5, 40.0),
        _row(4096, learned, "learned at settle", 17.0, 15.0, 36.0),
        _row(4096, "stock quanto 4-bit, residual 128", "stock", 20, 20, 38),
        _row(512, learned, "learned at settle", 100, 1, 1, batch=4),
    ]
    found = check_memory_targets(pd.DataFrame(rows)).set_index("target")
    assert len(found) == len(MEMORY_TARGETS)
    by_start = dict(found.iterrows())
    held = by_start["held over live from 512 tokens on, fixed widths and schedules"]
    assert (held["result"], held["where"]) == ("missed", f"{EMBEDDED}, 4,096 tokens, {learned}")
    assert held["measured"] == pytest.approx(17 / 15)
    assert by_start["held, learned 4-2 over static 4-bit, at every length"]["result"] == "met"
    assert by_start["held, learned 4-2 over static 4-bit, from 4,096 tokens on"]["result"] == "missed"
    assert by_start["held over live from 512 tokens on, widths token by token"]["result"] == "not measured"
    against = by_start["peak, 4,096 tokens: static 4-bit and learned 4-2 over stock quanto 4-bit, residual 128"]
    assert (against["result"], against["measured"]) == ("missed", pytest.approx(40 / 38))
    two = by_start["peak, 4,096 tokens, fixed widths and schedules, over live bytes and two layers in full precision"]
    assert (two["result"], two["measured"]) == ("met", pytest.approx(36 / 35))
    text = memory_targets_text(check_memory_targets(pd.DataFrame(rows)))
    assert "missed: held over live from 512 tokens on" in text
    assert "measured at most 1.133 (embedded large, 4,096 tokens, 4-2 " in text


def test_the_command_writes_what_the_documents_show(tmp_path, capsys):
    out = tmp_path / "memory.csv"
    small = ["--shapes", EMBEDDED, "--lengths", "64", "--batch", "2", "--batch-length", "64", "--stock-limit", "0"]
    assert main.main(["memory", *small, "--out", str(out)]) == 0
    assert "met: held, learned 4-2 over static 4-bit" in capsys.readouterr().out.replace("missed", "met")
    table = pd.read_csv(out)
    assert list(table) == list(COLUMNS)
    assert (table["peak_bytes"] >= table["held_bytes"]).all()
    assert (table["held_bytes"] >= table["live_bytes"]).all()
    assert table.query("method == 'full precision'")["held_share"].tolist() == [1, 1]
    assert out.with_suffix(".json").is_file()
    shown = shown_table(tmp_path)
    assert "| cache | 64 | 64 x 2 |" in shown
    assert "| full precision | 1.0" in shown
    assert memory_rows(tmp_path) == []
    assert "python main.py memory" in shown_table(tmp_path / "none")
    assert main.main(["memory", "--shapes", "none", "--lengths", "64"]) == 1
    assert "shape must be" in capsys.readouterr().err


def test_the_committed_table_reaches_what_it_says():
    """Held and live bytes as they are now: they depend on no machine."""
    table = pd.read_csv(main.__file__.replace("main.py", "data/memory.csv"))
    for tokens in (256, 512):
        row = table.query("shape == @EMBEDDED and tokens == @tokens and batch == 1").set_index("method")
        again = memory_table([(EMBEDDED, tokens, 1)], memory_methods()[:3], progress=False).set_index("method")
        for name in ("held_bytes", "live_bytes"):
            assert row.loc[again.index, name].tolist() == again[name].tolist()


def test_the_dtype_counts():
    assert full_bytes(CONFIG, 8, 2, torch.float16) == NUMBERS * 2 * 8 * 2
