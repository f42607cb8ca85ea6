"""Notebooks as they may be committed: tidied, and looked over for faults."""

import re
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from helpers.io import ROOT

MAX_BYTES = 1_000_000  # of a notebook; GitHub shows larger ones badly or not at all
FAST_MARK = "**Fast run, for tests only: these numbers are no results.**"


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
    text = nbformat.writes(notebook)
    size = len(text.encode())
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    folders = {str(ROOT), str(Path.home())} - {"/"}
    checks = {
        "is a fast run, whose numbers are no results": notebook.metadata.get("fast_run")
        or any(FAST_MARK in cell.source for cell in notebook.cells),
        "keeps the state of widgets": "widgets" in notebook.metadata,
        "was not executed once, from first to last cell": counts != list(range(1, len(counts) + 1)),
        f"has {size} bytes, more than the {MAX_BYTES} that are shown well": size >= MAX_BYTES,
        "names a folder of this machine": any(re.search(re.escape(path) + r"\b", text) for path in folders),
    }
    outputs = [(number, output) for number, cell in enumerate(notebook.cells) for output in cell.get("outputs", [])]
    found = [f"cell {number} {fault}" for number, output in outputs for fault in _output_faults(output)]
    return [fault for fault, present in checks.items() if present] + found


def _output_faults(output: NotebookNode) -> list[str]:
    data = output.get("data", {})
    text = str(output.get("text", "")) + str(data.get("text/plain", ""))
    checks = {
        "ends in an error": output.output_type == "error",
        "writes to stderr": output.get("name") == "stderr",
        "shows a widget or a script": any("widget" in mime or "javascript" in mime for mime in data),
        "holds a script": re.search(r"<script|<iframe", str(data.get("text/html", ""))),
        "prints an object's address": re.search(r"\bat 0x[0-9a-f]{6,}", text),
        "shows an SVG, which GitHub may not": "image/svg+xml" in data,
        "has an output that takes a third of the notebook": len(str(output)) > MAX_BYTES // 3,
    }
    return [fault for fault, present in checks.items() if present]
