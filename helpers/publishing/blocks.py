"""The README's tables, written from the results files between markers, so that they cannot say something else.

A table stands between `<!-- results:NAME -->` and `<!-- /results:NAME -->`. To add one, write a function in
`readme_tables` that returns Markdown, enter it in its `TABLES`, put the two markers into the README, and run
`python -m helpers.publishinging --readme`.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import nbformat

from helpers.io.atomic import atomic_path
from helpers.io.paths import ROOT
from helpers.publishing.tables import DATA, TABLES, markdown_table

README = ROOT / "README.md"


RUNS = DATA / "notebook_runs.json"


def read_runs() -> dict[str, dict]:
    """What the last full run of each notebook took, by the notebook's name without ending (see `publish.Run`)."""
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
        title = re.search(r"^# Part (.*)$", opening, re.M)
        asked = re.search(r"^\*\*Question:\*\* (.*)$", opening, re.M)
        found = re.search(r"^\*\*Finding:\*\* (.*)$", opening, re.M)
        if not (title and asked and found):
            raise ValueError(
                f"{path.name}: its first cell must hold '# Part N: ...', '**Question:**' and '**Finding:**'"
            )
        run = runs.get(path.stem)
        shown = f"{rounded_time(run['seconds'])}, {run['peak_bytes'] / 2**30:.1f} GiB" if run else "-"
        rows.append([f"[{path.stem}](notebooks/{path.name})", title[1], asked[1], found[1], shown])
    return markdown_table(["notebook", "part", "question", "finding", "run time, memory"], rows)


BLOCKS: dict[str, Callable[[], str]] = {"notebooks": notebook_table, **TABLES}


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


def _names(text: str) -> list[str]:
    """Names of the blocks that a README has; `ValueError` for one that nobody writes."""
    names = re.findall(r"<!-- results:(\S+) -->", text)
    unknown = sorted(set(names) - BLOCKS.keys())
    if unknown:
        raise ValueError(f"README.md: no table is called {', '.join(unknown)}; there are {', '.join(BLOCKS)}")
    return names


def stale_blocks(path: Path | None = None) -> list[str]:
    """Names of the README's tables that differ from what the results files say."""
    text = (path or README).read_text(encoding="utf-8")
    return [name for name in _names(text) if _with_block(text, name) != text]


def write_readme(path: Path | None = None) -> list[str]:
    """Write all tables anew and return the names of those that changed."""
    path = path or README
    text, changed = path.read_text(encoding="utf-8"), stale_blocks(path)
    for name in changed:
        text = _with_block(text, name)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return changed


def _with_block(text: str, name: str) -> str:
    return replace_block(text, f"results:{name}", BLOCKS[name](), "README.md")
