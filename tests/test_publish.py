"""Publishing: what a run leaves behind, what a failing one does not, and the README's tables."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest

from helpers.evaluation.benchmark.results import save_benchmarks
from helpers.io.paths import FAST, ROOT
from helpers.io.provenance import cpu_name, peak_memory_bytes
from helpers.io.results import read_result, require, write_json
from helpers.models.presets import get_preset
from helpers.publishing import blocks, command, execution, stopping, tidying
from helpers.publishing.tables.benchmark import benchmark_table
from helpers.publishing.tables.comparison import MULTIPLE_CHOICE, multiple_choice_table


def write_notebook(path, *sources, tags=()):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tags:
        cells[0].metadata["tags"] = list(tags)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"widgets": {}, "foreign": 1}), path)
    return path


NOISY = """import sys, os
print('a'); print('b')
print('noise', file=sys.stderr)
os.environ['TQDM_DISABLE']"""
FIGURE = """import numpy as np, pandas as pd, os
from helpers.publishing import plots
from helpers.io.provenance import provenance
from helpers.io.results import write_json
table = pd.DataFrame({"latency": np.arange(1.0, 60), "position": np.arange(59)})
figure = plots.latency_distribution(table, 8, "title", "subtitle")
plots.save_figure(figure, os.environ["OUT"], "01_x")
write_json(os.environ["OUT"] + "/x.json", provenance(seed=0));"""
WIDGET = "import ipywidgets\nipywidgets.IntSlider()"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A notebook published twice: its bytes, those of its figure and those of its JSON file, after each run."""
    folder = tmp_path_factory.mktemp("published")
    path = write_notebook(folder / "01_x.ipynb", NOISY, FIGURE, WIDGET, tags=["parameters"])
    outcomes, runs = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OUT", str(folder / "out"))
        patch.delenv("PRESET", raising=False)
        for _ in range(2):
            runs.append(execution.publish(path))
            outcomes.append([file.read_bytes() for file in (path, folder / "out/01_x.png", folder / "out/x.json")])
    return path, outcomes, runs


def test_publishing_tidies(published):
    path, _, _ = published
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    first, _, third = notebook.cells
    assert [output.output_type for output in first.outputs] == ["stream", "execute_result"]
    assert first.outputs[0].text == "a\nb\n"
    assert (first.execution_count, first.id, first.metadata) == (1, "cell-00", {"tags": ["parameters"]})
    assert third.outputs == []
    assert len(notebook.cells) == 3
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert tidying.faults(notebook) == []


def test_two_runs_leave_the_same_bytes(published):
    _, (first, second), _ = published
    assert first == second


def test_time_and_memory_are_measured(published):
    for run in published[2]:
        assert 0 < run.seconds < 120
        assert 20e6 < run.peak_bytes < 20e9
        assert run.device


def test_a_failing_cell_is_shown_and_leaves_the_file(tmp_path, capsys):
    path = write_notebook(tmp_path / "01_x.ipynb", "print('fine')", "raise ValueError('broken here')", "print('never')")
    before = path.read_bytes()
    assert command.main([str(path)]) == 1
    told = capsys.readouterr().err
    assert "01_x.ipynb stopped at cell 1" in told
    assert "raise ValueError('broken here')" in told
    assert "\x1b" not in told
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["01_x.ipynb"]


def test_a_notebook_ends_early_without_an_error(tmp_path):
    calls = (
        "from helpers.publishing import skip_rest",
        "skip_rest('')",
        "1 + 1",
        "skip_rest('no pair')",
        "raise ValueError",
    )
    notebook = nbformat.read(write_notebook(tmp_path / "early.ipynb", *calls), as_version=4)
    execution.execute(notebook, "early.ipynb", tmp_path)
    outputs = [cell.outputs for cell in notebook.cells]
    assert outputs[2][0]["data"]["text/plain"] == "2"
    assert outputs[3][0]["text"].startswith("no pair. The cells below are skipped; restart the kernel")
    assert outputs[4] == []


def test_a_dead_kernel_is_told_as_such(tmp_path):
    path = write_notebook(tmp_path / "01_x.ipynb", "import os\nos._exit(1)")
    with pytest.raises(RuntimeError, match=r"01_x\.ipynb stopped"):
        execution.publish(path)


def test_other_presets_leave_the_notebook(tmp_path, monkeypatch, capsys):
    path = write_notebook(tmp_path / "01_x.ipynb", "1 + 1")
    before = path.read_bytes()
    monkeypatch.setenv("PRESET", "smollm")
    assert command.main([str(path)]) == 0
    assert "notebook kept" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_a_full_run_notes_what_it_took(tmp_path, monkeypatch):
    monkeypatch.delenv("PRESET", raising=False)
    monkeypatch.setattr(execution, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(blocks, "RUNS", tmp_path / "runs.json")
    lines = "# X", "<!-- by --><!-- /by -->", "**Run time:** <!-- run -->?<!-- /run -->"
    opening = nbformat.v4.new_markdown_cell("\n\n".join(lines))
    notebook = nbformat.v4.new_notebook(cells=[opening, nbformat.v4.new_code_cell("1 + 1")])
    nbformat.write(notebook, tmp_path / "01_x.ipynb")
    run = execution.publish(tmp_path / "01_x.ipynb")
    assert json.loads((tmp_path / "runs.json").read_text())["01_x"]["peak_bytes"] == run.peak_bytes
    assert blocks.run_line("01_x") in nbformat.read(tmp_path / "01_x.ipynb", as_version=4).cells[0].source


def test_a_fast_run_writes_elsewhere_and_is_marked(tmp_path, monkeypatch):
    monkeypatch.setitem(execution.FAST_PARAMETERS, "01_x", {"COUNT": 2})
    source = "from helpers.io.provenance import provenance\nfrom helpers.models.presets import get_preset\n"
    source += "print(COUNT, get_preset().data_dir, (get_preset().data_dir / 'gate_sweep.csv').is_file())\n"
    path = write_notebook(tmp_path / "01_x.ipynb", "COUNT = 1000", source + "provenance()['fast']", tags=["parameters"])
    before = path.read_bytes()
    execution.publish_fast(path, tmp_path / "out")
    assert path.read_bytes() == before
    written = nbformat.read(tmp_path / "out/notebooks/01_x.ipynb", as_version=4)
    assert written.cells[-1].outputs[0].text == f"2 {tmp_path / 'out' / 'data'} True\n"
    assert written.cells[0].source == tidying.FAST_MARK
    assert "is a fast run, whose numbers are no results" in tidying.faults(written)
    assert command.main(["--check", str(tmp_path / "out/notebooks/01_x.ipynb")]) == 1


def test_results_of_fast_runs_go_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.setenv(FAST, str(tmp_path))
    assert get_preset("embedded").data_dir == tmp_path / "data"
    assert get_preset("smollm").figures_dir == tmp_path / "figures" / "smollm"
    monkeypatch.delenv(FAST)
    assert get_preset("embedded").data_dir == ROOT / "data"


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (nbformat.v4.new_output("error", ename="E", evalue="e", traceback=[]), "ends in an error"),
        (nbformat.v4.new_output("stream", name="stderr", text="x"), "writes to stderr"),
        (
            nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}}),
            "widget or a script",
        ),
        (nbformat.v4.new_output("display_data", {"text/html": "<script>1</script>"}), "holds a script"),
        (nbformat.v4.new_output("display_data", {"text/plain": "<X at 0x7f00aa11bb>"}), "an object's address"),
        (nbformat.v4.new_output("display_data", {"image/svg+xml": "<svg/>"}), "shows an SVG"),
        (nbformat.v4.new_output("stream", text="x" * 400_000), "a third of the notebook"),
        (nbformat.v4.new_output("stream", text=f"{ROOT}/data"), "names a folder of this machine"),
    ],
)
def test_faults_are_found(output, fault):
    cell = nbformat.v4.new_code_cell("1", execution_count=1, outputs=[output])
    assert any(fault in found for found in tidying.faults(nbformat.v4.new_notebook(cells=[cell])))


def test_a_notebook_that_was_not_run_is_found():
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("1", execution_count=2)], metadata={"widgets": {}}
    )
    found = tidying.faults(notebook)
    assert "was not executed once, from first to last cell" in found
    assert "keeps the state of widgets" in found


def test_the_committed_state_passes_the_check(capsys):
    assert command.main(["--check"]) == 0
    assert "OK: 5 notebooks and the documents" in capsys.readouterr().out


def test_tables_of_documents_are_those_of_the_results():
    assert blocks.stale_blocks() == [], "run: python -m helpers.publishing --readme"


def test_every_table_stands_in_one_document():
    texts = [path.read_text(encoding="utf-8") for path in blocks.DOCUMENTS]
    shown = [name for text in texts for name in re.findall(r"<!-- results:(\S+) -->", text)]
    assert sorted(shown) == sorted(blocks.BLOCKS)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 12_000


@pytest.mark.parametrize("document", blocks.DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_of_documents_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r'(?:\]\(|src=")([^)"#]+)', text):
        assert target.startswith("https://") or (document.parent / target).exists(), target


def test_tables_are_written_between_markers(tmp_path, monkeypatch, capsys):
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results:pair -->\nold\n<!-- /results:pair -->\nafter\n")
    monkeypatch.setattr(blocks, "DOCUMENTS", [path])
    monkeypatch.delenv("PRESET", raising=False)
    assert blocks.stale_blocks() == ["README.md: pair"]
    assert command.main(["--readme"]) == 0
    assert capsys.readouterr().out == "README.md: pair\n"
    text = path.read_text()
    assert text.startswith("before\n<!-- results:pair -->\n|  | large (3.05 M) |")
    assert text.endswith("|\n<!-- /results:pair -->\nafter\n")
    assert blocks.stale_blocks() == []
    assert command.main(["--readme"]) == 0
    assert path.read_text() == text


def test_tables_of_results_that_are_not_there_yet(tmp_path):
    assert multiple_choice_table(tmp_path) == ""
    assert "python main.py bench" in benchmark_table(tmp_path)
    text = "a\n<!-- x -->\n<!-- /x -->\nb"
    assert blocks.replace_block(text, "x", "", "f") == text
    scores = {"acc": 0.3, "acc_low": 0.2, "acc_high": 0.4, "acc_norm": 0.35, "acc_norm_low": 0.3, "acc_norm_high": 0.4}
    full = {"method": "full precision", "code_bits": 16.0, **scores}
    changes = {f"acc{norm}_change{end}": -0.012 for norm in ("", "_norm") for end in ("", "_low", "_high")}
    ours = {**full, "method": "static 4-bit", "code_bits": 4.4, **changes}
    schedule = {"method": "4-2 @8", "code_bits": 3.0}
    path = tmp_path / f"{MULTIPLE_CHOICE}.csv"
    path.parent.mkdir()
    pd.DataFrame([full, ours, schedule]).to_csv(path, index=False)
    path.with_suffix(".json").write_text(json.dumps({"item_count": 1000, "model": "models/m"}))
    table = multiple_choice_table(tmp_path)
    assert "1,000 items (validation), model m" in table
    assert "| static 4-bit | 4.40 | 30.0 [20.0, 40.0] | -1.20 [-1.20, -1.20] | 35.0 [30.0, 40.0] |" in table
    assert "4-2 @8" not in table, "it did not choose"


def test_the_benchmark_table_takes_machines_one_by_one(tmp_path):
    row = {"kind": "decode", "shape": "SmolLM-135M", "context": 512, "batch": 1, "dtype": "float32", "error": ""}
    times = {"DynamicCache": [4.0, 4.0], "static 4-bit": [2.0, 2.0], "learned 8-4-2": [3.0, 3.0]}
    rows = []
    for method, ms in times.items():
        ratio = ms[0] / 4
        numbers = {"ms": ms[0], "ratio": ratio, "ratio_low": ratio, "ratio_high": ratio, "round_ms": ms}
        rows.append({**row, "method": method, **numbers, "live_bytes": 100 * ms[0], "stored_bytes": 100 * ms[0]})
    for device in ("A", "B"):
        save_benchmarks(pd.DataFrame(rows), 30.0, {}, device, tmp_path)
    text = benchmark_table(tmp_path)
    assert text.count("| decode, SmolLM-135M, 512 tokens | 4 | 0.50 [0.50, 0.50] | 0.75 [0.75, 0.75] |") == 2
    assert "quanto" not in text, "no column without a number"
    assert "1 of 1 met on A:" in text


@pytest.mark.parametrize("text", ["<!-- results:pair -->\n", "<!-- results:nothing -->\n<!-- /results:nothing -->\n"])
def test_broken_markers_are_told(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "README.md"
    path.write_text(text)
    monkeypatch.setattr(blocks, "DOCUMENTS", [path])
    monkeypatch.delenv("PRESET", raising=False)
    assert command.main(["--readme"]) == 1
    assert "README.md" in capsys.readouterr().err
    assert path.read_text() == text


def test_missing_and_short_results_name_their_notebook(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"run notebooks/02_controller_training\.ipynb first"):
        require(tmp_path / "settle.json", "02_controller_training")
    pd.DataFrame({"a": [1]}).to_csv(tmp_path / "t.csv", index=False)
    assert len(read_result(tmp_path / "t.csv", "01_data_collection", ("a",))) == 1
    with pytest.raises(ValueError, match=r"lacks column\(s\) b: run notebooks/01_data_collection"):
        read_result(tmp_path / "t.csv", "01_data_collection", ("a", "b"))
    with pytest.raises(ValueError, match=r"has 1 row\(s\), fewer than 9"):
        read_result(tmp_path / "t.csv", "01_data_collection", ("a",), rows=9)


def test_an_unchanged_result_keeps_its_date(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"value": (1, 2), "date": "2025-01-01"})
    write_json(path, {"value": (1, 2), "date": "2025-01-02"})
    assert json.loads(path.read_text())["date"] == "2025-01-01"
    write_json(path, {"value": (1, 3), "date": "2025-01-03"})
    assert json.loads(path.read_text())["date"] == "2025-01-03"


def test_the_snippets_of_the_readme_run(monkeypatch, capsys):
    """One after the other, as a reader would paste them; the hub's model is replaced by the embedded one."""
    monkeypatch.chdir(ROOT)
    snippets = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(snippets) == 3
    assert max(len(snippet.strip().splitlines()) for snippet in snippets) <= 15
    names = {"texts": ["Once upon a time there was a cat."] * 3, "prompt": "Once upon a time"}
    for snippet in snippets:
        exec(snippet.replace("HuggingFaceTB/SmolLM-360M", "data/models/large"), names)
    assert names["cache"].get_seq_length() > 10
    assert len(names["result"].authors) > 0


def test_peak_memory_and_processor_are_told_on_any_system(monkeypatch):
    assert 20e6 < peak_memory_bytes() < 100e9
    assert cpu_name()

    def unreadable(*_, **__):
        raise OSError("no /proc here")

    monkeypatch.setattr(Path, "read_text", unreadable)
    assert 20e6 < peak_memory_bytes() < 100e9
    assert cpu_name()


def test_cells_after_a_reason_are_emptied(monkeypatch, capsys):
    shell = SimpleNamespace(input_transformers_cleanup=[])
    monkeypatch.setattr(stopping, "get_ipython", lambda: shell)
    stopping.skip_rest("")
    assert shell.input_transformers_cleanup == []
    stopping.skip_rest("no pair")
    (change,) = shell.input_transformers_cleanup
    assert change(["1 + 1\n"]) == []
    assert change([stopping.RUNS_ANYHOW + "\n", "1 + 1\n"])[1] == "1 + 1\n"
    assert capsys.readouterr().out.startswith("no pair. The cells below are skipped")


def test_who_hands_it_in_stands_where_names_are_given(monkeypatch, tmp_path):
    monkeypatch.delenv("SUBMITTED_BY", raising=False)
    assert blocks.submitted_by() == ""
    monkeypatch.setenv("SUBMITTED_BY", "Ada L. and Alan T.")
    assert blocks.submitted_by() == "**Handed in by:** Ada L. and Alan T."
    monkeypatch.delenv("SUBMITTED_BY")
    monkeypatch.setattr(blocks, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text('[tool.adaptive-generation]\nsubmitted-by = "Ada L."\n')
    assert blocks.submitted_by() == "**Handed in by:** Ada L."
    (tmp_path / "pyproject.toml").write_text("")
    assert blocks.submitted_by() == ""
