"""Records of a JSONL file or of a hub data set, each checked as it is read; a local file wins over the hub.

What a record holds is told by `items` and `stories`.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from helpers.models.hub import fetch_dataset

T = TypeVar("T")


def open_text(path: Path):
    """A text file, plain or gzipped, open for reading."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def require_fields(record: dict, fields: tuple[str, ...], where: str) -> None:
    """Raise `ValueError`, naming the place and the fields, where a record lacks some."""
    missing = sorted(set(fields) - record.keys())
    if missing:
        raise ValueError(f"{where}: missing field(s) {missing}; expected {', '.join(fields)}")


def load_records(
    source: str | Path, parse: Callable[[dict, str], T], split: str | None = None, hub_split: str = "train"
) -> list[T]:
    """Records, each through `parse(record, where)`, of the JSONL file `source`, else of the hub data set of that name.

    Of a file, the records that name this `split` or none (all without `split`); of a hub data set (`name` or
    `name:configuration`), `split` or `hub_split`. Raises `ValueError` that names file and line for anything else.
    """
    if not Path(source).is_file():
        data = fetch_dataset(str(source), split or hub_split)
        return [parse(record, f"{source}[{i}]") for i, record in enumerate(data)]
    path = Path(source)
    records = []
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path.name}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg})") from error
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
            parsed = parse(record, where)
            if split is None or record.get("split", split) == split:
                records.append(parsed)
    if not records:
        raise ValueError(f"{path.name}: holds no items" + (f" of split {split!r}" if split else ""))
    return records
