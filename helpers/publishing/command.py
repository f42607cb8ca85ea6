"""Run the notebooks in order, in place, and leave them fit to read on GitHub. `make run` calls this.

    python -m helpers.publishing [NOTEBOOK ...]    execute, measure, replace each file, rewrite the README's tables
    python -m helpers.publishinging --fast            execute everything small, into an ignored folder: for tests only
    python -m helpers.publishinging --readme          only rewrite the README's tables from the results files
    python -m helpers.publishinging --check           only look for what must not be committed

Each notebook is executed from a fresh kernel in its folder and replaces its file only when every cell has run. What
changes from run to run without meaning anything (execution times, cell ids, kernel versions, widget state, progress
bars) is not kept; `readme` holds the tables.
"""

import argparse
import sys
from pathlib import Path

import nbformat

from helpers.io.paths import ROOT
from helpers.models.presets import DEFAULT_PRESET, get_preset
from helpers.publishing import blocks as readme
from helpers.publishing.execution import NOTEBOOKS, publish, publish_fast
from helpers.publishing.tidying import faults

FAST_FOLDER = ROOT / ".fast"


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
