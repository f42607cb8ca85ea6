"""Stories and other running texts, and articles to go on from: of a file, of multiple-choice items or of the hub."""

from dataclasses import dataclass
from pathlib import Path

from helpers.models.hub import fetch_dataset
from helpers.models.items import load_multiple_choice, parse_item
from helpers.models.records import load_records, open_text, require_fields

STORY_SEPARATOR = "<|endoftext|>"


def read_stories(path: str | Path) -> list[str]:
    """Stories of a text file (`.txt` or `.txt.gz`), separated by lines of `<|endoftext|>`.

    Raises `ValueError` where the file holds no story.
    """
    path = Path(path)
    try:
        with open_text(path) as file:
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


def load_stories(source: str, split: str | None = None, field: str = "text") -> list[str]:
    """Texts from a local story or JSONL file, else the `field` column of the hub data set of that name.

    A JSONL file holds multiple-choice items, of which context and true ending are read. Splits as in `load_records`,
    by default all of a file and "train" of the hub; a story file is not split.
    """
    if Path(source).suffix == ".jsonl" and Path(source).is_file():
        return [item.text for item in load_multiple_choice(source, split)]
    if Path(source).is_file():
        return read_stories(source)
    return [record[field] for record in fetch_dataset(source, split or "train") if record[field].strip()]


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
