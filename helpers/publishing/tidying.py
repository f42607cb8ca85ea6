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
