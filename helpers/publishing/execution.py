"""Running one notebook from a fresh kernel: in full and in place, or small and elsewhere, for tests."""

import os
import re
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from helpers.io import atomic_path, write_json
from helpers.io.paths import FAST, ROOT
from helpers.io.provenance import cpu_name
from helpers.models.presets import DEFAULT_PRESET, get_preset
from helpers.publishing import blocks
from helpers.publishing.explorers import STATIC
from helpers.publishing.stopping import RUNS_ANYHOW
from helpers.publishing.tidying import FAST_MARK, tidy

NOTEBOOKS = ROOT / "notebooks"
PROBE = f"{RUNS_ANYHOW}\nfrom helpers.io.provenance import peak_memory_bytes\nprint(peak_memory_bytes())"

# What a fast run writes over the cell tagged `parameters`: everything runs, on next to nothing.
FAST_PARAMETERS: dict[str, dict[str, object]] = {
    "01_data_collection": {"MAX_TOKENS": 44},
    "02_controller_training": {"TEXTS": 4, "CHECK_TEXTS": 1, "FOLDS": 2, "ROWS": 5, "ROW_TOKENS": 192, "HIDDEN": (8,)},
    "03_controller_integration": {"NEW_TOKENS": 40, "ROWS": 2, "ROUNDS": 1, "LENGTH": 320},
    "04_baseline_comparison": {"ROWS": 1, "LENGTH": 112, "FIRST": 64, "ITEMS": 2, "LENGTHS": (48, 80)},
    "05_gated_generation": {"PROMPTS": 4, "TUNING": 3, "CUTS": (50,), "NEW_TOKENS": 12, "TARGETS": (0.2, 0.5)}
    | {"SWEEP": (0.2,), "SPEED_PROMPTS": 2, "PARTS_PROMPTS": 1, "CACHE_PROMPTS": 1},
}


@dataclass
class Run:
    """What one full execution of a notebook took: wall time, and the kernel's largest resident memory."""

    seconds: float
    peak_bytes: int
    device: str
    date: str


def execute(notebook: NotebookNode, name: str, folder: Path, variables: dict[str, str] | None = None) -> Run:
    """Execute `notebook` in place from a fresh kernel in `folder`; `variables` are added to the environment.

    Raises `RuntimeError` with the failing cell and its error.
    """
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Progress bars are for those who watch; on paper they would stand still.
    fixed = {"TQDM_DISABLE": "1", STATIC: "1", "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    environment = os.environ | fixed | (variables or {})
    if folder_of_texts := environment.get("TEXTS_DIR"):  # the kernel runs in another folder
        environment["TEXTS_DIR"] = str(Path(folder_of_texts).resolve())
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    settings = {"timeout": None, "record_timing": False, "coalesce_streams": True}
    resources, quiet = {"metadata": {"path": folder}}, ["--log-level=ERROR"]
    client = NotebookClient(notebook, resources=resources, extra_arguments=quiet, **settings)
    started = time.perf_counter()
    try:
        client.execute(env=environment)
    except (CellExecutionError, DeadKernelError) as error:
        outputs = [(number, output) for number, cell in enumerate(notebook.cells) for output in cell.get("outputs", [])]
        where = "".join(f" at cell {number}" for number, output in outputs if output.output_type == "error")
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
            runs = blocks.read_runs()
            write_json(blocks.RUNS, dict(sorted({**runs, path.stem: asdict(run)}.items())))
            _show_run(notebook, path.stem)
        with atomic_path(path) as temporary:
            nbformat.write(notebook, temporary)
    return run


def _show_run(notebook: NotebookNode, stem: str) -> None:
    """Bring the lines of the opening cell up to date that tell run time and memory, and who hands it in."""
    first = notebook.cells[0]
    for name, line in (("run", blocks.run_line(stem)), ("by", blocks.submitted_by())):
        first.source = blocks.replace_block(first.source, name, line, f"{stem}.ipynb", inline=True)


def _copy_results(source: Path, target: Path) -> None:
    """The files of a results folder and its controllers, where there are any."""
    target.mkdir(parents=True)
    for path in source.iterdir() if source.is_dir() else ():
        if path.is_file():
            shutil.copy(path, target)
        elif path.name == "controllers":
            shutil.copytree(path, target / path.name)


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
    for folder in sorted({"data", get_preset().data_dir.relative_to(ROOT).as_posix()}):
        _copy_results(ROOT / folder, out / folder)
    run = execute(notebook, path.name, path.parent, {FAST: str(out.resolve())})
    notebook.metadata["fast_run"] = True
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell(FAST_MARK))
    with atomic_path(out / "notebooks" / path.name) as temporary:
        nbformat.write(tidy(notebook), temporary)
    return run
