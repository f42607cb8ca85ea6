"""The notebooks: fit to read as they are committed, and able to run as they stand."""

import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from helpers.io.paths import ROOT
from helpers.publishing import blocks, execution, tidying

NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
FIGURES = ROOT / "figures"
TITLES = {
    "01_data_collection": "# Part 1: Data Collection for Controller Training",
    "02_controller_training": "# Part 2: Train a Lightweight Controller",
    "03_controller_integration": "# Part 3: Integrate the Controller into Generation",
    "04_baseline_comparison": "# Part 4: Compare vs Baselines",
    "05_gated_generation": "# Part 5: Entropy-Gated Generation",
}


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag):
    return [cell for cell in code_of(notebook) if tag in cell.metadata.get("tags", [])]


def figure_names(notebook):
    return [name for cell in code_of(notebook) for name in re.findall(r'figures_dir, "(\w+)"', cell.source)]


def test_there_are_five():
    assert [path.stem for path in NOTEBOOKS] == list(TITLES)


def test_fit_to_be_committed(notebook):
    nbformat.validate(notebook)
    assert tidying.faults(notebook) == []


def test_kept_as_publishing_leaves_them(path, notebook):
    assert nbformat.writes(tidying.tidy(nbformat.read(path, as_version=4))) == nbformat.writes(notebook)


def test_the_opening_says_what_to_expect(path, notebook):
    opening = notebook.cells[0].source
    assert opening.startswith(TITLES[path.stem] + "\n")
    assert "CPSC 4420 - Artificial Intelligence" in opening
    assert "Project 3, Lightweight LLMs" in opening
    assert "Task 4" in opening
    assert opening.count("<!-- by -->") == 1
    assert "Handed in by" not in opening, "by whom is filled in by whoever hands it in"
    for part in ("**Goal:** ", "**Question:** ", "**Finding:** ", "| reads | writes |", "**Contents:** "):
        assert part in opening, part


def test_the_opening_tells_what_the_last_full_run_took(path, notebook):
    opening = notebook.cells[0].source
    line = blocks.run_line(path.stem)
    assert blocks.replace_block(opening, "run", line, path.name, inline=True) == opening


def test_contents_name_the_sections(notebook):
    heads = re.findall(r"^## (\d+ .*)$", "\n".join(cell.source for cell in notebook.cells[1:]), re.M)
    contents = re.search(r"\*\*Contents:\*\* (.*)", notebook.cells[0].source)[1]
    assert [head.replace(" ", "-") for head in heads] == re.findall(r"\]\(#([^)]*)\)", contents)
    assert [int(head.split()[0]) for head in heads] == list(range(1, len(heads) + 1))


def test_prose_before_code_and_short_cells(notebook):
    kinds = "".join("m" if cell.cell_type == "markdown" else "c" for cell in notebook.cells)
    assert kinds.startswith("m")
    assert "cccc" not in kinds
    lengths = sorted(len(cell.source.splitlines()) for cell in code_of(notebook))
    assert lengths[len(lengths) // 2] <= 10
    assert sum(length > 20 for length in lengths) <= 1  # the imports


def test_one_parameters_cell_one_setup_cell_and_checkpoints(notebook):
    assert len(tagged(notebook, "parameters")) == 1
    with_imports = [cell for cell in code_of(notebook) if re.search(r"^(from|import) ", cell.source, re.M)]
    assert with_imports == code_of(notebook)[:1]
    assert any("environment_table(" in cell.source for cell in code_of(notebook)[2:4])  # 05 may end before it
    checks = [cell for cell in code_of(notebook) if "OK:" in cell.source]
    assert checks
    for cell in checks:
        shown = "".join(output.get("text", "") for output in cell.outputs)
        assert len(re.findall("^OK: ", shown, re.M)) == 1


def test_it_closes_with_what_was_learnt(notebook):
    closing = notebook.cells[-1].source
    assert "What was learnt" in closing
    assert "**What this does not show.**" in closing
    assert re.findall(r"^(\d)\. ", closing, re.M) == ["1", "2", "3"]


def test_findings_have_caveats(notebook):
    text = "\n".join(cell.source for cell in notebook.cells)
    assert text.count("*Caveat.*") >= len(re.findall(r"^## \d", text, re.M)) // 2


def test_figures_are_there(notebook):
    for name in figure_names(notebook):
        assert (FIGURES / f"{name}.png").is_file(), name


def test_no_figure_is_left_over():
    used = {name for path in NOTEBOOKS for name in figure_names(nbformat.read(path, as_version=4))}
    text = "".join(path.read_text() for path in [*blocks.DOCUMENTS, ROOT / "data" / "models" / "README.md"])
    text += (ROOT / "helpers" / "publishing" / "commands.py").read_text()
    left = [path.stem for path in FIGURES.glob("*.png") if path.stem not in used and path.stem not in text]
    assert left == []


def test_figures_are_named_and_small_enough():
    for path in FIGURES.glob("*.png"):
        assert re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem), path.name
        assert path.stat().st_size < 400_000, path.name


def test_a_fast_run_is_told_from_a_result(notebook):
    notebook.metadata["fast_run"] = True
    assert any("fast run" in fault for fault in tidying.faults(notebook))
    del notebook.metadata["fast_run"]
    notebook.cells[0].source = tidying.FAST_MARK
    assert any("fast run" in fault for fault in tidying.faults(notebook))


def test_results_are_not_of_a_fast_run():
    for path in [*(ROOT / "data").glob("*.json"), *(ROOT / "data" / "controllers").glob("*.json")]:
        assert not json.loads(path.read_text()).get("fast"), path.name


@pytest.mark.parametrize("stem", TITLES)
def test_fast_runs_overwrite_parameters_that_exist(stem):
    cell = tagged(nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4), "parameters")[0]
    for name in execution.FAST_PARAMETERS[stem]:
        assert re.search(rf"^{name} = ", cell.source, re.M), name


def snapshot():
    folders = [ROOT / "data", ROOT / "figures", ROOT / "notebooks"]
    return {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("stem", TITLES)
def test_runs_in_fast_mode_and_leaves_the_results_alone(stem, tmp_path):
    before = snapshot()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PRESET", None)
    path = ROOT / "notebooks" / f"{stem}.ipynb"
    command = [sys.executable, "-m", "helpers.publishing", "--fast", "--out", str(tmp_path), str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert snapshot() == before
    written = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    assert written.metadata["fast_run"]
    assert tidying.faults(written) == ["is a fast run, whose numbers are no results"]
    for name in figure_names(written):
        assert (tmp_path / "figures" / f"{name}.png").is_file(), name


def test_a_preset_without_a_pair_ends_part_5_without_an_error(tmp_path):
    path = ROOT / "notebooks" / "05_gated_generation.ipynb"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PRESET": "smollm2"}
    command = [sys.executable, "-m", "helpers.publishing", "--fast", "--out", str(tmp_path), str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = nbformat.read(tmp_path / "notebooks" / path.name, as_version=4)
    (said,) = [cell.outputs for cell in written.cells if cell.cell_type == "code" and cell.outputs]
    assert "The cells below are skipped" in said[0].text
    assert "embedded" in said[0].text  # a preset that has a pair
