"""Run the notebooks in order, in place, and leave them fit to read on GitHub. `make run` calls this.

    python -m helpers.publish [NOTEBOOK ...]

Each notebook is executed from a fresh kernel in its folder and replaces its file only when every cell has run.
What changes from run to run without meaning anything (execution times, cell ids, kernel versions, widget state,
progress bars) is not kept.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from helpers.explorers import STATIC
from helpers.files import ROOT, atomic_path
from helpers.models import DEFAULT_PRESET, get_preset

NOTEBOOKS = ROOT / "notebooks"


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Normalise an executed notebook in place: outputs coalesced, no stderr, no widgets, stable ids and metadata."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
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


def publish(path: Path) -> float:
    """Execute the notebook `path` and replace it by the result; return the seconds it took.

    Raises `RuntimeError` with the failing cell and its error; the file is then untouched.
    """
    notebook = nbformat.read(path, as_version=4)
    started = time.perf_counter()
    # Progress bars are for those who watch; on paper they would stand still.
    environment = {**os.environ, "TQDM_DISABLE": "1", STATIC: "1"}
    resources = {"metadata": {"path": path.parent}}
    client = NotebookClient(
        notebook, timeout=None, record_timing=False, resources=resources, extra_arguments=["--log-level=ERROR"]
    )
    try:
        client.execute(env=environment)
    except CellExecutionError as error:
        raise RuntimeError(f"{path.name} stopped:\n{error}") from error
    seconds = time.perf_counter() - started
    if get_preset().name == DEFAULT_PRESET:
        with atomic_path(path) as temporary:
            nbformat.write(tidy(notebook), temporary)
    return seconds


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of them, in order")
    options = parser.parse_args(arguments)
    preset = get_preset()
    for path in options.notebooks or sorted(NOTEBOOKS.glob("[0-9]*.ipynb")):
        print(f"{path.name} on preset {preset.name} ...", flush=True)
        try:
            seconds = publish(path)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
        written = (
            "" if preset.name == DEFAULT_PRESET else f" (results in {preset.data_dir.relative_to(ROOT)}; file kept)"
        )
        print(f"{path.name}: {seconds:.0f} s{written}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
