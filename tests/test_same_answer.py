"""The same seed on the same machine gives the same answer, file by file; another number of threads nearly the same.

What must be the same: every number of every table but the times, every weight of every controller. With another
number of threads sums are taken in another order, and the tolerances below are what is promised then.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from helpers.io.paths import ROOT

# Columns that are measured with a clock.
TIMES = ["latency", "seconds", "first_token_seconds"]
COMMANDS = """
import sys
from pathlib import Path
import torch
import fault_jobs, main
out, threads = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(threads)
for command in (
    ["collect", "--count", "2", "--max-tokens", "64", "--seed", "3", "--out", str(out / "collected.csv")],
    ["gate", "--prompts", "2", "--calibration-texts", "4", "--max-new-tokens", "12", "--recalibrate", "--seed", "3",
     "--out", str(out / "gate.csv")],
):
    assert main.main(command) == 0
if threads == 1:
    fault_jobs.training(out / "controllers")
    fault_jobs.pretraining(out / "model")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Three processes: twice the same with one thread, once with two."""
    folders, processes = {}, []
    for number, (name, threads) in enumerate((("first", 1), ("again", 1), ("two threads", 2))):
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            "PYTHONHASHSEED": str(number),
            "TQDM_DISABLE": "1",
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",  # or two threads on a busy machine would wait for each other at full speed
        }
        command = [sys.executable, "-c", COMMANDS, str(folders[name]), str(threads)]
        if threads > 1:
            finish(processes)
        processes.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT)
        )
    finish(processes)
    return folders


def finish(processes: list[subprocess.Popen]) -> None:
    """Wait for all of them; what went wrong is shown."""
    while processes:
        process = processes.pop()
        _, told = process.communicate()
        assert process.returncode == 0, told.decode()[-2000:]


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / name).drop(columns=TIMES, errors="ignore")


def test_the_same_seed_gives_the_same_tables_controllers_and_models(runs):
    files = {name: {p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for name, f in runs.items()}
    assert files["first"] == files["again"]
    tables = sorted(name for name in files["first"] if name.endswith(".csv"))
    weights = sorted(name for name in files["first"] if name.endswith(".safetensors"))
    assert {"collected.csv", "gate.csv", "controllers/costs.csv", "model/training_log.csv"} <= set(tables)
    controllers = [f"controllers/{name}.safetensors" for name in ("commit", "imitation", "settle")]
    assert weights == [*controllers, "model/model.safetensors"]
    for name in tables:
        first, again = (table(runs[run], name) for run in ("first", "again"))
        pd.testing.assert_frame_equal(first, again, check_exact=True, obj=name)
    for name in weights:
        assert (runs["first"] / name).read_bytes() == (runs["again"] / name).read_bytes(), name


def test_descriptions_differ_in_times_and_date_only(runs):
    for name in ("collected.json", "controllers/imitation.json", "controllers/costs.json", "gate.json"):
        first, again = (json.loads((runs[run] / name).read_text()) for run in ("first", "again"))
        assert first.keys() == again.keys()
        assert {key for key in first if first[key] != again[key]} <= {"date", "speed"}, name


def test_what_is_compared_are_no_constants(runs):
    weights = load_file(runs["first"] / "controllers" / "imitation.safetensors")
    assert all(np.ptp(value) > 0 for name, value in weights.items() if name.endswith("weight"))
    collected = table(runs["first"], "collected.csv")
    assert collected["entropy"].nunique() > 100


def test_another_number_of_threads_changes_the_last_digits_only(runs):
    """Features within 0.001 (entropy in nats); widths, hits, authors and texts the same but for one in fifty."""
    one, two = (table(runs[run], "collected.csv") for run in ("first", "two threads"))
    assert one[["rarity", "text_id", "position", "token_id"]].equals(two[["rarity", "text_id", "position", "token_id"]])
    same = (one["kv_bits"] == two["kv_bits"]).mean()
    assert same >= 0.98
    before_any_difference = (one["kv_bits"] == two["kv_bits"]).cummin()
    for column in ("entropy", "attn_var", "confidence"):
        assert (one[column] - two[column]).abs()[before_any_difference].max() < 1e-3, column
    assert (one["accuracy"] == two["accuracy"]).mean() >= 0.98
    gates = [table(runs[run], "gate.csv") for run in ("first", "two threads")]
    thresholds = [json.loads((runs[run] / "gate.json").read_text())["threshold"] for run in ("first", "two threads")]
    assert abs(thresholds[0] - thresholds[1]) < 1e-3
    assert (gates[0]["text"] == gates[1]["text"]).mean() >= 0.75
    worst = max((one[c] - two[c]).abs().max() for c in ("entropy", "confidence"))
    print(f"\none and two threads: {same:.1%} of the widths the same, features within {worst:.1e}")
