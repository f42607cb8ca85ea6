"""Articles to go on from, as the gate's prompts are made of, and running text to calibrate it on."""

from dataclasses import dataclass
from pathlib import Path

from helpers.models.items import parse_item
from helpers.models.records import load_records, require_fields
from helpers.models.stories import load_stories


@dataclass(frozen=True)
class Article:
    """A text to go on from, and what is expected to come of it (CNN/DailyMail's `article` and `highlights`)."""

    article: str
    highlights: str


def _parse_article(record: dict, where: str) -> Article:
    require_fields(record, ("article", "highlights"), where)
    return Article(record["article"].strip(), record["highlights"].strip())


def load_articles(source: str | Path, split: str | None = "test") -> list[Article]:
    """Articles in CNN/DailyMail's schema (`article`, `highlights`) from a local JSONL file, else from the hub."""
    return load_records(source, _parse_article, split, "test")


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
        return [text for texts in load_records(source, _parse_paragraphs, split) for text in texts]
    lines = load_stories(source, split)
    if len(lines) == 1 and Path(source).is_file():
        lines = lines[0].splitlines()
    paragraphs = [line.strip() for line in lines if line.strip() and not line.strip().startswith("= ")]
    if not paragraphs:
        raise ValueError(f"text file {source}: holds headings only")
    return paragraphs
