"""Records of JSONL files and hub data sets, checked as they are read."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from helpers.models.hub import fetch_dataset

T = TypeVar("T")


def open_text(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def require_fields(record: dict, fields: tuple[str, ...], where: str) -> None:
    missing = sorted(set(fields) - record.keys())
    if missing:
        raise ValueError(f"{where}: missing field(s) {missing}; expected {', '.join(fields)}")


def read_records(path: str | Path, parse: Callable[[dict, str], T], split: str | None = None) -> list[T]:
    """Records of a JSONL file, each through `parse`; with `split`, only those that name this split or none.

    Raises `ValueError` that names file and line for anything else.
    """
    path = Path(path)
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


def fetch_records(source: str, split: str):
    name, _, config = source.partition(":")
    return fetch_dataset(name, split, config or None)
