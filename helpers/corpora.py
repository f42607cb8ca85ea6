"""Texts: HellaSwag items, stories and plain text, from the hub or from local files in the same formats.

Knows nothing of models; tokenizing happens where a text meets one. A local path always wins over a hub name, and
nothing is ever replaced silently by something else.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from helpers.hub import fetch_dataset

STORY_SEPARATOR = "<|endoftext|>"
T = TypeVar("T")


@dataclass(frozen=True)
class MultipleChoice:
    """One multiple-choice item: `label` is the index of the true one among `endings`."""

    context: str
    endings: tuple[str, ...]
    label: int

    @property
    def text(self) -> str:
        """Context and true ending: the text that HellaSwag was cut from."""
        return f"{self.context} {self.endings[self.label]}"


def _open_text(path: Path):
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")


def read_stories(path: str | Path) -> list[str]:
    """Stories of a text file (`.txt` or `.txt.gz`), separated by lines of `<|endoftext|>`.

    Raises `ValueError` where the file holds no story.
    """
    path = Path(path)
    try:
        with _open_text(path) as file:
            stories = [story.strip() for story in file.read().split(STORY_SEPARATOR)]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"text file {path}: cannot be read as UTF-8 text ({error})") from error
    stories = [story for story in stories if story]
    if not stories:
        raise ValueError(f"text file {path}: holds no text; expected stories separated by {STORY_SEPARATOR}")
    return stories


def split_holdout(stories: list[str], holdout: float = 0.1) -> tuple[list[str], list[str]]:
    """The first `1 - holdout` and the last `holdout` share of the stories, in file order."""
    if not 0 < holdout < 1:
        raise ValueError(f"holdout must lie between 0 and 1, got {holdout}")
    if len(stories) < 2:
        raise ValueError(f"{len(stories)} text(s) cannot be split in two")
    cut = min(max(1, round(len(stories) * (1 - holdout))), len(stories) - 1)
    return stories[:cut], stories[cut:]


@dataclass(frozen=True)
class Article:
    """A text to go on from, and what is expected to come of it (CNN/DailyMail's `article` and `highlights`)."""

    article: str
    highlights: str


def _parse_item(record: dict, where: str) -> MultipleChoice:
    """An item in the schema of HellaSwag, OpenBookQA (`question_stem`) or ARC (`question`)."""
    if "choices" in record:
        stem = "question_stem" if "question_stem" in record else "question"
        _require(record, (stem, "choices", "answerKey"), where)
        labels, endings = list(record["choices"]["label"]), tuple(record["choices"]["text"])
        if record["answerKey"] not in labels:
            raise ValueError(f"{where}: answerKey {record['answerKey']!r} is none of its choices {labels}")
        context = record[stem].strip()
        # ARC's questions end as questions do; a cue makes their choices read on.
        context = context if stem == "question_stem" else f"Question: {context}\nAnswer:"
        return MultipleChoice(context, endings, labels.index(record["answerKey"]))
    _require(record, ("ctx", "endings", "label"), where)
    endings, label = tuple(record["endings"]), str(record["label"])
    if not label.isdigit() or int(label) >= len(endings):
        raise ValueError(f"{where}: label {record['label']!r} is not an index into its {len(endings)} endings")
    return MultipleChoice(record["ctx"].strip(), endings, int(label))


def _parse_article(record: dict, where: str) -> Article:
    _require(record, ("article", "highlights"), where)
    return Article(record["article"].strip(), record["highlights"].strip())


def _require(record: dict, fields: tuple[str, ...], where: str) -> None:
    missing = sorted(set(fields) - record.keys())
    if missing:
        raise ValueError(f"{where}: missing field(s) {missing}; expected {', '.join(fields)}")


def read_records(path: str | Path, parse: Callable[[dict, str], T], split: str | None = None) -> list[T]:
    """Records of a JSONL file, each through `parse`; with `split`, only those that name this split or none.

    Raises `ValueError` that names file and line for anything else.
    """
    path = Path(path)
    records = []
    with _open_text(path) as file:
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


def read_multiple_choice(path: str | Path, split: str | None = None) -> list[MultipleChoice]:
    """Items of a JSONL file in HellaSwag's schema (`ctx`, `endings`, `label`), OpenBookQA's or ARC's."""
    return read_records(path, _parse_item, split)


def read_articles(path: str | Path, split: str | None = None) -> list[Article]:
    """Articles of a JSONL file in CNN/DailyMail's schema: `article`, `highlights` (other fields are ignored)."""
    return read_records(path, _parse_article, split)


def load_multiple_choice(source: str, split: str | None = None) -> list[MultipleChoice]:
    """Items from a local JSONL file, or else from the hub data set of that name (HellaSwag, OpenBookQA, ARC).

    Of a local file, the records of `split` and those that name none; from the hub, `split` or "validation". A hub
    configuration is named after a colon: `allenai/ai2_arc:ARC-Challenge`.
    """
    if Path(source).is_file():
        return read_multiple_choice(source, split)
    return [_parse_item(record, f"{source}[{i}]") for i, record in enumerate(_fetch(source, split or "validation"))]


def load_stories(source: str, split: str | None = None, field: str = "text") -> list[str]:
    """Texts from a local story or JSONL file, or else the `field` column of the hub data set of that name.

    Splits as in `load_multiple_choice`; "train" where none is named. A story file is not split.
    """
    if Path(source).suffix == ".jsonl" and Path(source).is_file():
        return [item.text for item in read_multiple_choice(source, split)]
    if Path(source).is_file():
        return read_stories(source)
    return [record[field] for record in _fetch(source, split or "train") if record[field].strip()]


def load_articles(source: str, split: str = "test") -> list[Article]:
    """Articles from a local JSONL file, or else from the hub data set `name` or `name:configuration`."""
    if Path(source).is_file():
        return read_articles(source, split)
    return [_parse_article(record, f"{source}[{i}]") for i, record in enumerate(_fetch(source, split))]


def _parse_paragraphs(record: dict, where: str) -> tuple[str, ...]:
    if "article" in record:
        article = _parse_article(record, where)
        return article.article, article.highlights
    return (_parse_item(record, where).text,)


def load_paragraphs(source: str, split: str = "train") -> list[str]:
    """Running text to calibrate on: paragraphs of WikiText without its headings, or stories.

    `source` is a local JSONL file of multiple-choice items (whole texts) or articles (two texts each), a story file,
    a text file with one paragraph a line, or else a hub data set, `name` or `name:configuration`, with a column `text`.
    """
    if Path(source).suffix == ".jsonl" and Path(source).is_file():
        return [text for texts in read_records(source, _parse_paragraphs, split) for text in texts]
    if Path(source).is_file():
        stories = read_stories(source)
        lines = stories if len(stories) > 1 else stories[0].splitlines()
    else:
        lines = [record["text"] for record in _fetch(source, split)]
    paragraphs = [line.strip() for line in lines if line.strip() and not line.strip().startswith("= ")]
    if not paragraphs:
        raise ValueError(f"text file {source}: holds headings only")
    return paragraphs


def _fetch(source: str, split: str):
    name, _, config = source.partition(":")
    return fetch_dataset(name, split, config or None)


def pack_tokens(token_ids: Iterable[list[int]], length: int) -> list[list[int]]:
    """Concatenate token lists and cut them into rows of exactly `length`; the rest that fills no row is dropped."""
    flat = [token for ids in token_ids for token in ids]
    return [flat[i : i + length] for i in range(0, len(flat) - length + 1, length)]


def sample_items(items: list[MultipleChoice], count: int, seed: int = 0) -> list[MultipleChoice]:
    """`count` different items in seeded random order; the first items of a set are often alike (HellaSwag's are).

    Raises `ValueError` where there are fewer items.
    """
    if not 0 < count <= len(items):
        raise ValueError(f"count must lie between 1 and the number of items ({len(items)}), got {count}")
    return random.Random(seed).sample(items, count)


def sample_texts(items: list[MultipleChoice], count: int, seed: int = 0) -> list[str]:
    """`sample_items`, each as context and true ending."""
    return [item.text for item in sample_items(items, count, seed)]
