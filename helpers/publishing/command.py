"""Run the notebooks in order, in place, and leave them fit to read on GitHub. `make run` calls this.

    python -m helpers.publishing [NOTEBOOK ...]    execute, measure, replace each file, rewrite the documents' tables
    python -m helpers.publishing --fast            execute everything small, into an ignored folder: for tests only
    python -m helpers.publishing --readme          only rewrite the documents' tables from the results files
    python -m helpers.publishing --check           only look for what must not be committed

Each notebook is executed from a fresh kernel in its folder and replaces its file only when every cell has run. What
changes from run to run without meaning anything (execution times, cell ids, kernel versions, widget state, progress
bars) is not kept.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import nbformat
import tyro

from helpers.io import ROOT
from helpers.models.presets import DEFAULT_PRESET, get_preset
from helpers.publishing.blocks import stale_blocks, write_documents
from helpers.publishing.execution import NOTEBOOKS, publish, publish_fast
from helpers.publishing.tidying import faults


@dataclass(frozen=True)
class PublishOptions:
    """What is run or checked."""

    notebooks: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()  # default: all of them, in order
    fast: bool = False  # run small, for tests; committed files stay untouched
    out: Path = ROOT / ".fast"  # folder that takes a fast run
    readme: bool = False  # only rewrite the documents' tables
    check: bool = False  # only look for what must not be committed


def check(paths: list[Path]) -> list[str]:
    """What must not be committed: faults of notebooks, and tables of documents that differ from the results."""
    found = [f"{path.name} {fault}" for path in paths for fault in faults(nbformat.read(path, as_version=4))]
    return found + [f"{table} differs from the results" for table in stale_blocks()]


def main(arguments: list[str] | None = None) -> int:
    """Publish or check; the exit status. What goes wrong is told on stderr."""
    options = tyro.cli(PublishOptions, args=arguments, description=__doc__, config=(tyro.conf.FlagCreatePairsOff,))
    paths = [path.resolve() for path in options.notebooks] or sorted(NOTEBOOKS.glob("[0-9]*.ipynb"))
    try:
        if options.check:
            found = check(paths)
            print("\n".join(found) or f"OK: {len(paths)} notebooks and the documents")
            return int(bool(found))
        if not options.readme:
            _run_all(paths, options.out if options.fast else None)
        if not options.fast and get_preset().name == DEFAULT_PRESET:
            print("\n".join(write_documents()) or "tables unchanged")
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
