"""Tables inside the documents, written from the results files between markers, so that they cannot say something else.

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`. To add one, write a function in `tables`
that returns Markdown, enter it in `TABLES`, put the two markers into a document, and run
`python -m helpers.publishing --readme`.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import nbformat
import pandas as pd

from helpers.io import ROOT, atomic_path
from helpers.publishing.tables import TABLES
from helpers.publishing.tables.layout import DATA, markdown

# GitHub shows each in its folder.
DOCUMENTS = [ROOT / folder / "README.md" for folder in ("", "data", "helpers", "tests")]
RUNS = DATA / "notebook_runs.json"


def read_runs() -> dict[str, dict]:
    """What the last full run of each notebook took (`execution.Run`), by the notebook's name without ending."""
    return json.loads(RUNS.read_text(encoding="utf-8")) if RUNS.is_file() else {}


def rounded_time(seconds: float) -> str:
    """A run time in words, rounded so that it holds for the next run as well.

    >>> rounded_time(47.3), rounded_time(100), rounded_time(492)
    ('50 s', '2 min', '8 min')
    """
    return f"{max(10, round(seconds, -1)):.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def run_line(stem: str) -> str:
    """The sentence on run time and memory in the opening of a notebook."""
    run = read_runs().get(stem)
    if run is None:
        return "not measured yet"
    memory = run["peak_bytes"] / 2**30
    return f"{rounded_time(run['seconds'])}, peak memory {memory:.1f} GiB ({run['device']})"


def notebook_table() -> str:
    """Part, question and finding of each notebook as its opening gives them, and the measured run time."""
    rows, runs = [], read_runs()
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        opening = nbformat.read(path, as_version=4).cells[0].source
        lines = ("# Part", r"\*\*Question:\*\*", r"\*\*Finding:\*\*")
        found = [re.search(f"^{line} (.*)$", opening, re.M) for line in lines]
        if not all(found):
            raise ValueError(
                f"{path.name}: its first cell must hold '# Part N: ...', '**Question:**' and '**Finding:**'"
            )
        run = runs.get(path.stem)
        shown = f"{rounded_time(run['seconds'])}, {run['peak_bytes'] / 2**30:.1f} GiB" if run else "-"
        rows.append([f"[{path.stem}](notebooks/{path.name})", *(match[1] for match in found), shown])
    return markdown(pd.DataFrame(rows, columns=["notebook", "part", "question", "finding", "run time, memory"]))


def submitted_by() -> str:
    """The line that says who hands this in, empty where nobody is named.

    Names are those of the variable SUBMITTED_BY, else of `submitted-by` in `[tool.adaptive-generation]` of
    pyproject.toml.
    """
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")).get("tool", {})
    names = os.environ.get("SUBMITTED_BY") or settings.get("adaptive-generation", {}).get("submitted-by", "")
    return f"**Handed in by:** {names}" if names else ""


BLOCKS: dict[str, Callable[[], str]] = {"by": submitted_by, "notebooks": notebook_table, **TABLES}


def replace_block(text: str, name: str, content: str, where: str, inline: bool = False) -> str:
    """`text` with `content` between the markers `<!-- NAME -->` and `<!-- /NAME -->`.

    >>> replace_block("a <!-- run -->old<!-- /run -->", "run", "new", "x.md", inline=True)
    'a <!-- run -->new<!-- /run -->'

    Raises `ValueError` unless there is exactly one such pair.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{where}: expected '{start}' once, and '{end}' once after it")
    before, rest = text.split(start)
    _, after = rest.split(end)
    gap = "" if inline else "\n"
    content = f"{content}{gap}" if content else ""
    return f"{before}{start}{gap}{content}{end}{after}"


def stale_blocks() -> list[str]:
    """`document: table` of the tables that differ from what the results files say."""
    return [f"{_shown(path)}: {name}" for path in DOCUMENTS for name in _updated(path)[1]]


def write_documents() -> list[str]:
    """Write all tables anew and return `document: table` of those that changed."""
    changed = []
    for path in DOCUMENTS:
        text, stale = _updated(path)
        changed += [f"{_shown(path)}: {name}" for name in stale]
        if stale:
            with atomic_path(path) as temporary:
                temporary.write_text(text, encoding="utf-8")
    return changed


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def _updated(path: Path) -> tuple[str, list[str]]:
    """A document with its tables as the results files have them, and the names of those that it had otherwise."""
    text, stale = path.read_text(encoding="utf-8"), []
    names = re.findall(r"<!-- results:(\S+) -->", text)
    unknown = sorted(set(names) - BLOCKS.keys())
    if unknown:
        raise ValueError(f"{_shown(path)}: no table is called {', '.join(unknown)}; there are {', '.join(BLOCKS)}")
    for name in names:
        new = replace_block(text, f"results:{name}", BLOCKS[name](), _shown(path))
        stale += [name] * (new != text)
        text = new
    return text, stale
