"""Several processes share the texts of `collect` and `compare` and give what one process gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import main
from helpers.io import processes
from helpers.io.paths import ROOT
from helpers.io.processes import share_out, spread
from helpers.models.loading import choose_device
from helpers.training.table import COLUMNS

WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "up", "to", "it", "while", "old", "birds", "sang")
# Both launchers, as the README gives them.
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
}  # fmt: skip


def sentence(words: int, seed: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """Multiple-choice items of unequal length, and stories."""
    folder = tmp_path_factory.mktemp("texts")
    items = [
        {
            "ctx": sentence(8 + 5 * (i % 7), i),
            "endings": [sentence(3 + j, 100 * i + j) for j in range(3)],
            "label": i % 3,
        }
        for i in range(42)  # half of them for training
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "stories.txt").write_text("\n<|endoftext|>\n".join(sentence(600, i) for i in range(60)))
    return {"items": str(folder / "items.jsonl"), "stories": str(folder / "stories.txt")}


def launch(
    launcher: str | None, arguments: list[str], cwd: Path, script: Path = ROOT / "main.py"
) -> subprocess.CompletedProcess:
    """Run `script` under a launcher, or plainly in one process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *LAUNCHERS.get(launcher, []), str(script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, cwd=cwd)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_collect_what_one_collects(launcher, tiny_folder, sources, tmp_path):
    options = ["--model", str(tiny_folder), "--texts", sources["items"], "--count", "19", "--max-tokens", "40"]
    tables, told = [], []
    for number, how in enumerate((None, launcher)):
        out = tmp_path / f"{number}.csv"
        done = launch(how, ["collect", *options, "--out", str(out)], tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("=== Overall Summary (mean) ===") == 1, "the main process alone speaks"
        tables.append(pd.read_csv(out))
        told.append(json.loads(out.with_suffix(".json").read_text())["processes"])
    assert told == [1, 2]
    one, two = tables
    assert list(two) == COLUMNS
    assert two["text_id"].is_monotonic_increasing
    assert two["text_id"].nunique() == 19
    pd.testing.assert_frame_equal(two.drop(columns="latency"), one.drop(columns="latency"))
    assert (two["latency"] > 0).all()
    assert not list(tmp_path.glob(".*partial*"))


def test_two_processes_take_up_what_one_left(tiny_folder, sources, tmp_path, monkeypatch):
    """A collection interrupted in one process is completed by two, with no text lost or read twice."""
    from helpers.training import collection

    options = [
        "collect",
        "--model",
        str(tiny_folder),
        "--texts",
        sources["items"],
        "--count",
        "12",
        "--max-tokens",
        "40",
    ]
    assert main.main([*options, "--out", str(tmp_path / "whole.csv")]) == 0
    real = collection.collect_text

    def stopping(model, ids, rarity, text_id, *rest):
        if text_id == 5:
            raise RuntimeError("stopped")
        return real(model, ids, rarity, text_id, *rest)

    monkeypatch.setattr(collection, "collect_text", stopping)
    assert main.main([*options, "--out", str(tmp_path / "t.csv")]) == 1
    kept = (tmp_path / ".t.partial.csv").read_text().splitlines()[1:]
    done = launch("torchrun", [*options, "--out", str(tmp_path / "t.csv")], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    resumed, whole = pd.read_csv(tmp_path / "t.csv"), pd.read_csv(tmp_path / "whole.csv")
    assert resumed["text_id"].tolist() == whole["text_id"].tolist()
    times = [float(line.split(",")[COLUMNS.index("latency")]) for line in kept]
    assert resumed["latency"][: len(kept)].tolist() == times, "texts that were there are not read again"
    pd.testing.assert_frame_equal(
        resumed.drop(columns="latency"), whole.drop(columns="latency"), atol=2e-4, check_exact=False
    )


# A few methods instead of all, one of them with a random control that `compare_methods` adds by itself.
FEW_METHODS = """
import sys
import main
from helpers.evaluation import commands
from helpers.policies.schedules import AgeSchedule
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.cache.plan import Step
from helpers.evaluation.methods import FullPrecision, Group, PackedMethod

schedule = PackedMethod(AgeSchedule(8, (Step(1, 2, keep=0.25),), "random"))
commands.default_methods = lambda controllers: [
    Group("full precision", [FullPrecision()]),
    Group("static", [PackedMethod(FixedBits(4))]),
    Group("rule", [PackedMethod(EntropyRule((3.0, 4.0, 5.0)))], random_control=True),
    Group("schedule", [schedule], chooses_endings=False),
]
sys.exit(main.main(sys.argv[1:]))
"""


def test_two_processes_compare_as_one_does(tiny_folder, sources, tmp_path):
    (tmp_path / "few.py").write_text(FEW_METHODS)
    options = ["compare", "--model", str(tiny_folder), "--texts", sources["stories"], "--items", sources["items"]]
    options += ["--count", "5", "--max-rows", "5", "--batch", "2", "--rounds", "1"]
    results = []
    for number, how in enumerate((None, "torchrun")):
        done = launch(how, [*options, "--out", str(tmp_path / str(number))], tmp_path, tmp_path / "few.py")
        assert done.returncode == 0, done.stderr[-3000:]
        name = "baseline_comparison_tiny"
        told = json.loads((tmp_path / str(number) / f"{name}.json").read_text())
        assert (told["processes"], told["rows"]) == (number + 1, 5)
        results.append([pd.read_csv(tmp_path / str(number) / f"{name}{part}.csv") for part in ("", "_pairs")])
    (one, one_pairs), (two, two_pairs) = results
    assert "random as rule-based dynamic" in set(two["method"])
    times = [column for column in one if column.startswith("latency")]
    assert times
    assert two[times].notna().all().all()
    pd.testing.assert_frame_equal(two.drop(columns=times), one.drop(columns=times))
    pd.testing.assert_frame_equal(two_pairs, one_pairs)


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        main.main(["train"])
    assert "train runs in one process; several can share collect and compare" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_complete_and_even(count):
    sizes = np.random.default_rng(0).integers(1, 100, 40).tolist()
    shares = share_out(sizes, count)
    assert sorted(piece for share in shares for piece in share) == list(range(40))
    loads = [sum(sizes[piece] for piece in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)
    assert share_out([], count) == [[]] * count


def test_spread_keeps_the_order_of_one_process(monkeypatch):
    assert spread(lambda i: i * i, [3, 1, 2]) == [0, 1, 4]
    # The second of two processes: works out its own share, and what the first worked out comes by gathering.
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes, "connect", lambda: None)
    monkeypatch.setattr(processes, "gather_object", lambda mine: [(0, "first"), (1, "first"), *mine])
    assert spread(lambda i: f"second {i}", [9, 3, 5, 4]) == ["first", "first", "second 2", "second 3"]


def test_each_process_of_a_machine_has_its_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    devices = []
    for rank in ("0", "3", "5"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        devices.append(choose_device()[0])
    assert devices == [torch.device("cuda", n) for n in (0, 3, 1)]
