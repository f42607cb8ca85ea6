"""Stories and other running texts, and articles to go on from: of a file, of multiple-choice items or of the hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from helpers.models.items import parse_item
from helpers.models.records import load_records, open_text, require_fields
from helpers.models.splits import TRAINING, Part, choose, locate

STORY_SEPARATOR = "<|endoftext|>"
TITLE = re.compile(r"^(?=[ \t]*= [^=\n].* =[ \t]*$)", re.MULTILINE)  # of the first level: ` = Title = `
HELD_OUT = 0.1  # share of a text file that is for testing


def cut_text(text: str) -> tuple[list[str], str]:
    """The texts that a file's text holds, and what they are: stories, or else articles, or else paragraphs.

    Stories end at `<|endoftext|>`, articles begin at WikiText's ` = Title = `, paragraphs end at blank lines.
    """
    if STORY_SEPARATOR in text:
        parts, unit = text.split(STORY_SEPARATOR), "story"
    elif TITLE.search(text):
        parts, unit = TITLE.split(text), "article"
    else:
        parts, unit = re.split(r"\n\s*\n", text), "paragraph"
    return [part.strip() for part in parts if part.strip()], unit


def _read_texts(path: Path) -> tuple[list[str], str]:
    try:
        with open_text(path) as file:
            texts, unit = cut_text(file.read())
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"text file {path}: cannot be read as UTF-8 text ({error})") from error
    if not texts:
        raise ValueError(f"text file {path}: holds no text; expected stories separated by {STORY_SEPARATOR}")
    return texts, unit


def read_stories(path: str | Path) -> list[str]:
    """Stories of a text file (`.txt` or `.txt.gz`), or what else `cut_text` finds in it.

    Raises `ValueError` where the file holds no text.
    """
    return _read_texts(Path(path))[0]


def _load(source: str, split: str | None, cut: bool = True) -> Part[tuple[str, ...]]:
    """Every text of a source, an article with its highlights. Splits as in `load_stories`."""
    place = locate(source, split, TRAINING)
    if place.path is None or ".jsonl" in place.path.suffixes:
        rows = load_records(source, _parse_texts, split, TRAINING, cut=cut)
        if place.path is None and any(len(row) == 1 and TITLE.match(row[0]) for row in rows):  # a line a row
            texts, _ = cut_text("\n".join(line for (line,) in rows))
            return Part([(text,) for text in texts], rows.split)
        return Part([row for row in rows if row[0].strip()], rows.split)
    texts, unit = _read_texts(place.path)
    holdout = HELD_OUT if place.named else 0.5
    return choose([(text,) for text in texts], place, unit, holdout=holdout, cut=cut)


def load_stories(source: str, split: str | None = None) -> Part[str]:
    """Texts from a local text or JSONL file, a folder of texts or the hub data set of that name.

    Of a text file, what `cut_text` finds; of records, the `text`, the `article`, or a multiple-choice item's context
    and true ending. Splits as in `splits`, by default all of a file and "train" of a data set; of a text file that is
    not found in a folder of texts, the last tenth is for testing, of records the second half.
    """
    part = _load(source, split)
    return Part([texts[0] for texts in part], part.split)


def load_last(source: str, share: float, split: str) -> Part[str]:
    """The last `share` of the texts of a file, whatever split its records name; of a data set, all of its `split`.

    For measurements of what nothing was trained for.
    """
    if not 0 < share <= 1:
        raise ValueError(f"last must lie above 0 and be at most 1, got {share}")
    if not Path(source).is_file():
        return load_stories(source, split)
    texts = load_stories(source)
    last = texts[-max(1, round(len(texts) * share)) :]
    return Part(last, f"the last {len(last)} of {len(texts)} in {Path(source).name}")


@dataclass(frozen=True)
class Article:
    """A text to go on from, and what is expected to come of it (CNN/DailyMail's `article` and `highlights`)."""

    article: str
    highlights: str


def _parse_article(record: dict, where: str) -> Article:
    require_fields(record, ("article", "highlights"), where)
    return Article(record["article"].strip(), record["highlights"].strip())


def load_articles(source: str | Path, split: str | None = "test", cut: bool = True) -> Part[Article]:
    """Articles in CNN/DailyMail's schema (`article`, `highlights`) from a JSONL file, a folder of texts or the hub.

    Splits as in `splits`; without `cut`, a file whose records name no split is read whole.
    """
    return load_records(source, _parse_article, split, "test", "article", cut)


def _parse_texts(record: dict, where: str) -> tuple[str, ...]:
    if "text" in record:
        return (record["text"],)
    if "article" in record:
        article = _parse_article(record, where)
        return article.article, article.highlights
    return (parse_item(record, where)[0].text,)


def load_paragraphs(source: str, split: str | None = TRAINING, cut: bool = True) -> Part[str]:
    """Running text to calibrate on: paragraphs of WikiText without its headings, or stories.

    `source` is a local JSONL file of multiple-choice items (whole texts) or articles (two texts each), a text file of
    stories, articles or paragraphs, or else a data set. Splits as in `load_articles`.
    """
    part = _load(source, split, cut)
    texts = [text for texts in part for text in texts]
    lines = [line for text in texts for line in (text.splitlines() if len(texts) == 1 or TITLE.match(text) else [text])]
    paragraphs = [line.strip() for line in lines if line.strip() and not line.strip().startswith("= ")]
    if not paragraphs:
        raise ValueError(f"text file {source}: holds headings only")
    return Part(paragraphs, part.split)
