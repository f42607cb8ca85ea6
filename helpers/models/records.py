"""Records of a JSONL file or of a data set, each checked as it is read; a local file wins over the hub.

What a record holds is told by `items` and `stories`.
"""

import gzip
import json
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

from helpers.models.hub import fetch_dataset
from helpers.models.splits import Part, choose, locate

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
    source: str | Path,
    parse: Callable[[dict, str], T],
    split: str | None = None,
    set_split: str = "train",
    unit: str = "record",
    cut: bool = True,
    content: Callable[[T], Hashable] = lambda record: record,
) -> Part[T]:
    """Records, each through `parse(record, where)`, of a JSONL file, or of the data set `source`.

    Of a file, what `splits.choose` finds for `split` (all without one); of a data set in a folder of texts or on the
    hub (`name` or `name:configuration`), `split` or else `set_split`. Raises `ValueError` that names file and line for
    anything else.
    """
    place = locate(source, split, set_split)
    if place.path is None:
        data = fetch_dataset(str(source), place.split)
        return Part([parse(each, f"{source}[{i}]") for i, each in enumerate(data)], f"the hub's split {place.split}")
    path, records, own = place.path, [], []
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
            records.append(parse(record, where))
            own.append(record.get("split"))
    if not records:
        raise ValueError(f"{path.name}: holds no items")
    return choose(records, place, unit, own, cut=cut, content=content)
