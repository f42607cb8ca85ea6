"""Where the project and its results lie, and how a path is shown in results and messages."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAST = "HELPERS_FAST"  # variable set by `publish --fast`: the folder that takes what such a run writes


def results_root() -> Path:
    """The folder above `data/` and `figures/` that results go to: the project, or what a fast run was given."""
    return Path(os.environ.get(FAST) or ROOT)


def relative_to_root(path: str | Path) -> str:
    """A path as shown in results: relative to the project where it lies inside it, else only its last two parts."""
    if not Path(path).is_absolute() and not Path(path).exists():
        return str(path)  # the name of a hub repository
    path = Path(path).resolve()
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return "/".join(path.parts[-2:])
