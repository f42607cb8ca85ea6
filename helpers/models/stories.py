"""Stories and other running texts, from a story file, from multiple-choice items or from the hub."""

from pathlib import Path

from helpers.models.hub import fetch_dataset
from helpers.models.items import load_multiple_choice
from helpers.models.records import open_text

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
