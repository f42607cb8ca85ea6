"""Run the notebooks in order, in place, and leave them fit to read on GitHub. `make run` calls this.

    python -m helpers.publish [NOTEBOOK ...]    execute, measure, replace each file, rewrite the README's tables
    python -m helpers.publish --fast            execute everything small, into an ignored folder: for tests only
    python -m helpers.publish --readme          only rewrite the README's tables from the results files
    python -m helpers.publish --check           only look for what must not be committed

Each notebook is executed from a fresh kernel in its folder and replaces its file only when every cell has run. What
changes from run to run without meaning anything (execution times, cell ids, kernel versions, widget state, progress
bars) is not kept; `readme` holds the tables.
"""

import argparse
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from helpers import readme
from helpers.explorers import STATIC
from helpers.files import FAST, ROOT, atomic_path, cpu_name, write_json
from helpers.models import DEFAULT_PRESET, get_preset

NOTEBOOKS = ROOT / "notebooks"
FAST_FOLDER = ROOT / ".fast"
MAX_BYTES = 1_000_000  # of a notebook; GitHub shows larger ones badly or not at all
FAST_MARK = "**Fast run, for tests only: these numbers are no results.**"
PROBE = "from helpers.files import peak_memory_bytes\nprint(peak_memory_bytes())"

# What a fast run writes over the cell tagged `parameters`: everything runs, on next to nothing.
FAST_PARAMETERS: dict[str, dict[str, object]] = {
    "01_data_collection": {"MAX_TOKENS": 44},
    "02_controller_training": {"TEXTS": 4, "FISHER_TEXTS": 1, "FOLDS": 2, "ROWS": 4, "ROW_TOKENS": 192, "HIDDEN": (8,)},
    "03_controller_integration": {"NEW_TOKENS": 40, "ROWS": 2, "ROUNDS": 1, "LENGTH": 320},
    "04_baseline_comparison": {"ROWS": 1, "LENGTH": 112, "FIRST": 64, "ITEMS": 2, "ROUNDS": 1, "LENGTHS": (48, 80)},
    "05_gated_generation": {
        "PROMPTS": 4,
        "TUNING": 3,
        "CUTS": (50,),
        "NEW_TOKENS": 12,
        "TARGETS": (0.2, 0.5),
        "SWEEP": (0.2,),
        "SPEED_PROMPTS": 2,
        "PARTS_PROMPTS": 1,
        "CACHE_PROMPTS": 1,
    },
}


@dataclass
class Run:
    """What one full execution of a notebook took: wall time, and the kernel's largest resident memory."""

    seconds: float
    peak_bytes: int
    device: str
    date: str


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Normalise an executed notebook in place: outputs coalesced, no stderr, no widgets, stable ids and metadata."""
    fast = notebook.metadata.get("fast_run")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        **({"fast_run": True} if fast else {}),
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        tags = cell.metadata.get("tags")
        cell.metadata = {"tags": tags} if tags else {}
        if cell.cell_type == "code":
            cell.outputs = _tidy_outputs(cell.outputs)
    return notebook


def _tidy_outputs(outputs: list) -> list:
    kept: list = []
    for output in outputs:
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif any("widget" in mime for mime in output.get("data", {})):
            continue
        kept.append(output)
    return kept


def faults(notebook: NotebookNode) -> list[str]:
    """What keeps a notebook from being committed, each fault in one line."""
    found = []
    if notebook.metadata.get("fast_run") or any(FAST_MARK in cell.source for cell in notebook.cells):
        found.append("is a fast run, whose numbers are no results")
    if "widgets" in notebook.metadata:
        found.append("keeps the state of widgets")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not executed once, from first to last cell")
    size = len(nbformat.writes(notebook).encode())
    if size >= MAX_BYTES:
        found.append(f"has {size} bytes, more than the {MAX_BYTES} that are shown well")
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            found += [f"cell {number} {fault}" for fault in _output_faults(output)]
    text = nbformat.writes(notebook)
    for path in {str(ROOT), str(Path.home())} - {"/"}:
        if re.search(re.escape(path) + r"\b", text):
            found.append("names a folder of this machine")
    return found


def _output_faults(output: NotebookNode) -> list[str]:
    found = []
    data = output.get("data", {})
    text = str(output.get("text", "")) + str(data.get("text/plain", ""))
    if output.output_type == "error":
        found.append("ends in an error")
    if output.get("name") == "stderr":
        found.append("writes to stderr")
    if any("widget" in mime or "javascript" in mime for mime in data):
        found.append("shows a widget or a script")
    if re.search(r"<script|<iframe", str(data.get("text/html", ""))):
        found.append("holds a script")
    if re.search(r"\bat 0x[0-9a-f]{6,}", text):
        found.append("prints an object's address")
    if "image/svg+xml" in data:
        found.append("shows an SVG, which GitHub may not")
    if len(str(output)) > MAX_BYTES // 3:
        found.append("has an output that takes a third of the notebook")
    return found


def execute(notebook: NotebookNode, name: str, folder: Path, variables: dict[str, str] | None = None) -> Run:
    """Execute `notebook` in place from a fresh kernel in `folder`; `variables` are added to the environment.

    Raises `RuntimeError` with the failing cell and its error.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Progress bars are for those who watch; on paper they would stand still.
    environment = {
        **os.environ,
        "TQDM_DISABLE": "1",
        STATIC: "1",
        "PYTHONHASHSEED": "0",
        "PYTHONPATH": os.pathsep.join(paths),
        **(variables or {}),
    }
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    client = NotebookClient(
        notebook,
        timeout=None,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": folder}},
        extra_arguments=["--log-level=ERROR"],
    )
    started = time.perf_counter()
    try:
        client.execute(env=environment)
    except (CellExecutionError, DeadKernelError) as error:
        number = next(
            (i for i, cell in enumerate(notebook.cells) for o in cell.get("outputs", []) if o.output_type == "error"),
            None,
        )
        where = "" if number is None else f" at cell {number}"
        message = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
        raise RuntimeError(f"{name} stopped{where}:\n{message}") from error
    seconds = time.perf_counter() - started
    peak = int(notebook.cells.pop().outputs[0].text)
    return Run(round(seconds, 1), peak, cpu_name(), date.today().isoformat())


def publish(path: Path) -> Run:
    """Execute the notebook `path`, replace it by the result, and note in `data/notebook_runs.json` what it took.

    On presets other than the default the file and the note stay as they are. Raises `RuntimeError` with the failing
    cell and its error; the file is then untouched.
    """
    notebook = nbformat.read(path, as_version=4)
    if path.parent == NOTEBOOKS:
        _show_run(notebook, path.stem)  # a missing marker is found before an hour has gone
    run = execute(notebook, path.name, path.parent)
    if get_preset().name == DEFAULT_PRESET:
        tidy(notebook)
        if path.parent == NOTEBOOKS:
            runs = readme.read_runs()
            write_json(readme.RUNS, dict(sorted({**runs, path.stem: asdict(run)}.items())))
            _show_run(notebook, path.stem)
        with atomic_path(path) as temporary:
            nbformat.write(notebook, temporary)
    return run


def _show_run(notebook: NotebookNode, stem: str) -> None:
    """Bring the line of the opening cell that tells run time and memory up to date."""
    first = notebook.cells[0]
    first.source = readme.replace_block(first.source, "run", readme.run_line(stem), f"{stem}.ipynb", inline=True)


def publish_fast(path: Path, out: Path) -> Run:
    """Execute the notebook `path` small; it goes to `out/notebooks`, what it writes to `out/data` and `out/figures`.

    `out/data` starts as a copy of the committed results, so that each notebook runs without those before it. The
    written notebook is marked, in its metadata and in its first cell, as no result.
    """
    notebook = nbformat.read(path, as_version=4)
    overwrite = FAST_PARAMETERS.get(path.stem, {})
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\n\n# fast run\n" + "\n".join(f"{name} = {value!r}" for name, value in overwrite.items())
    shutil.rmtree(out / "data", ignore_errors=True)
    for source in (ROOT / "data").glob("*"):
        target = out / "data" / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_file():
            shutil.copy(source, target)
        elif source.name == "controllers":
            shutil.copytree(source, target)
    run = execute(notebook, path.name, path.parent, {FAST: str(out.resolve())})
    notebook.metadata["fast_run"] = True
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(FAST_MARK))
    with atomic_path(out / "notebooks" / path.name) as temporary:
        nbformat.write(tidy(notebook), temporary)
    return run


def check(paths: list[Path]) -> list[str]:
    """What must not be committed: faults of notebooks, and tables of the README that differ from the results."""
    found = [f"{path.name} {fault}" for path in paths for fault in faults(nbformat.read(path, as_version=4))]
    return found + [f"README.md: table '{name}' differs from the results" for name in readme.stale_blocks()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them, in order")
    parser.add_argument("--fast", action="store_true", help="run small, for tests; committed files stay untouched")
    parser.add_argument("--out", type=Path, default=FAST_FOLDER, help="folder that takes a fast run")
    parser.add_argument("--readme", action="store_true", help="only rewrite the README's tables")
    parser.add_argument("--check", action="store_true", help="only look for what must not be committed")
    options = parser.parse_args(arguments)
    paths = [path.resolve() for path in options.notebooks] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    try:
        if options.check:
            found = check(paths)
            print("\n".join(found) or f"OK: {len(paths)} notebooks and the README")
            return int(bool(found))
        if not options.readme:
            _run_all(paths, options.out if options.fast else None)
        if not options.fast and get_preset().name == DEFAULT_PRESET:
            print("README.md:", ", ".join(readme.write_readme()) or "tables unchanged")
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _run_all(paths: list[Path], fast: Path | None) -> None:
    preset = get_preset()
    for path in paths:
        print(f"{path.name} on preset {preset.name}{' (fast)' if fast else ''} ...", flush=True)
        run = publish_fast(path, fast) if fast else publish(path)
        kept = "" if fast or preset.name == DEFAULT_PRESET else f"; results in data/{preset.name}, notebook kept"
        print(f"{path.name}: {run.seconds:.0f} s, {run.peak_bytes / 2**30:.1f} GiB{kept}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
