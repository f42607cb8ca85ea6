"""Results files: tables and JSON with their provenance, and answers that are kept for the question they belong to.

A file that is not there yet is an error that names the notebook which writes it.
"""

import hashlib
import json
from pathlib import Path

from helpers.io.atomic import atomic_path
from helpers.io.paths import relative_to_root
from helpers.io.provenance import provenance


def require(path: str | Path, notebook: str) -> Path:
    """`path`, or a `FileNotFoundError` that names the notebook (`02_controller_training`) which writes it."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{relative_to_root(path)} is not there yet: run notebooks/{notebook}.ipynb first")
    return path


def read_result(path: str | Path, notebook: str, columns: tuple[str, ...] = (), rows: int = 1):
    """The CSV that `notebook` wrote, as a data frame; `ValueError` where columns are missing or rows are too few."""
    import pandas as pd

    table = pd.read_csv(require(path, notebook))
    missing = [name for name in columns if name not in table]
    if missing or len(table) < rows:
        fault = f"lacks column(s) {', '.join(missing)}" if missing else f"has {len(table)} row(s), fewer than {rows}"
        raise ValueError(f"{relative_to_root(path)} {fault}: run notebooks/{notebook}.ipynb again")
    return table


def write_json(path: str | Path, content: object) -> None:
    """Write `content` as indented JSON, atomically; a result that is the same but for its `date` keeps the old date."""
    path = Path(path)
    if isinstance(content, dict) and "date" in content and path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            old = None
        dated = isinstance(old, dict) and "date" in old
        if dated and old == json.loads(json.dumps({**content, "date": old["date"]})):
            content = old
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_table(
    path: str | Path,
    table,
    about: dict[str, object] | None = None,
    float_format: str | None = "%.6g",
    index: bool = False,
) -> None:
    """Write a data frame as the CSV `path`, atomically; with `about`, also `path` as .json: `about` and provenance."""
    with atomic_path(path) as temporary:
        table.to_csv(temporary, index=index, float_format=float_format)
    if about is not None:
        write_json(Path(path).with_suffix(".json"), about | provenance())


def write_filled(path: str | Path, template: str | Path, **fields: object) -> None:
    """Write the text file `template` with its `{fields}` filled in as `path`, atomically."""
    content = Path(template).read_text(encoding="utf-8").format(**fields)
    with atomic_path(path) as temporary:
        temporary.write_text(content, encoding="utf-8")


def key_hash(key: object) -> str:
    """A hash of anything that JSON can hold: equal keys, equal hash."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def write_keyed(path: str | Path, key: object, content: dict[str, object]) -> None:
    """Keep `content`, which took long to find, in the JSON `path`, with a hash of the question that it answers."""
    write_json(path, {"key": key_hash(key), **content})


def read_keyed(path: str | Path, key: object) -> dict[str, object] | None:
    """What `write_keyed` kept for `key`; None for no file, a damaged one, and one that answers another question."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) and content.get("key") == key_hash(key) else None
