"""Articles to go on from, and running text to calibrate on."""

from dataclasses import dataclass
from pathlib import Path

from helpers.models.items import parse_item
from helpers.models.records import fetch_records, read_records, require_fields
from helpers.models.stories import read_stories


@dataclass(frozen=True)
class Article:
    """A text to go on from, and what is expected to come of it (CNN/DailyMail's `article` and `highlights`)."""

    article: str
    highlights: str


def _parse_article(record: dict, where: str) -> Article:
    require_fields(record, ("article", "highlights"), where)
    return Article(record["article"].strip(), record["highlights"].strip())


def read_articles(path: str | Path, split: str | None = None) -> list[Article]:
    """Articles of a JSONL file in CNN/DailyMail's schema: `article`, `highlights` (other fields are ignored)."""
    return read_records(path, _parse_article, split)


def load_articles(source: str, split: str = "test") -> list[Article]:
    """Articles from a local JSONL file, or else from the hub data set `name` or `name:configuration`."""
    if Path(source).is_file():
        return read_articles(source, split)
    return [_parse_article(record, f"{source}[{i}]") for i, record in enumerate(fetch_records(source, split))]


def _parse_paragraphs(record: dict, where: str) -> tuple[str, ...]:
    if "article" in record:
        article = _parse_article(record, where)
        return article.article, article.highlights
    return (parse_item(record, where).text,)


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
        lines = [record["text"] for record in fetch_records(source, split)]
    paragraphs = [line.strip() for line in lines if line.strip() and not line.strip().startswith("= ")]
    if not paragraphs:
        raise ValueError(f"text file {source}: holds headings only")
    return paragraphs
