"""Files, figures, the command line: what a user opens."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import torch

import main
from helpers.io.atomic import atomic_path
from helpers.io.paths import ROOT, relative_to_root
from helpers.io.provenance import environment_table, provenance
from helpers.io.results import write_json
from helpers.models.presets import PRESETS
from helpers.training.table import read_training_data


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"a": 1})

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("{half")
            raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_half()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("one", "two"):
        with atomic_path(tmp_path / "d", directory=True) as temporary:
            (temporary / f"{content}.txt").write_text(content)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["two.txt"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_paths_in_results_do_not_name_this_machine(tmp_path):
    assert relative_to_root(ROOT / "data" / "x.csv") == "data/x.csv"
    assert relative_to_root(tmp_path / "models" / "m") == "models/m"
    assert relative_to_root("HuggingFaceTB/SmolLM-360M") == "HuggingFaceTB/SmolLM-360M"
    assert {"device", "torch", "date", "extra"} <= provenance(extra=1).keys()
    assert "date" not in environment_table(preset="embedded").index


def run_main(*arguments: str) -> int:
    return main.main(list(arguments))


def test_collect_from_the_command_line(tiny_folder, tmp_path, capsys):
    out = tmp_path / "c.csv"
    arguments = ["--model", str(tiny_folder), "--texts", PRESETS["embedded"].multiple_choice, "--out", str(out)]
    assert run_main("collect", *arguments, "--count", "2", "--max-tokens", "20") == 0
    told = capsys.readouterr().out
    assert "=== Overall Summary (mean) ===" in told
    assert "38 tokens of 2 texts" in told
    assert len(read_training_data(out)) == 38


def test_quality_from_the_command_line(tiny_folder, tmp_path, capsys, monkeypatch):
    from helpers.evaluation import fixed_widths

    monkeypatch.setattr(fixed_widths, "SAMPLED_METHODS", fixed_widths.SAMPLED_METHODS[2:3])
    monkeypatch.setattr(fixed_widths, "TEXT_METHODS", fixed_widths.TEXT_METHODS[1:2])
    out = tmp_path / "q.csv"
    arguments = [
        "--model",
        str(tiny_folder),
        "--texts",
        PRESETS["embedded"].stories,
        "--out",
        str(out),
        "--sequences",
        "2",
    ]
    assert run_main("quality", *arguments) == 0
    assert "static 4-bit, block 16" in capsys.readouterr().out
    assert pd.read_csv(out).kl.between(0, 1).all()
    assert "device" in json.loads(out.with_suffix(".json").read_text())


def test_mistakes_are_answered_in_one_line(capsys):
    assert run_main("collect", "--preset", "gpt5") == 1
    assert capsys.readouterr().err == "collect: preset must be one of embedded, smollm2, smollm, llama, got 'gpt5'\n"


def test_committed_training_data_is_sound():
    table = read_training_data(ROOT / "data" / "controller_training.csv")
    assert len(table) >= 1000
    assert table.text_id.nunique() >= 20


def test_helpers_import_from_anywhere(tmp_path):
    command = [sys.executable, "-c", "import helpers.cache; print('ok')"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == "ok\n"
    assert (2, 13) <= tuple(map(int, torch.__version__.split(".")[:2])) < (3,), "as requirements.txt has it"
