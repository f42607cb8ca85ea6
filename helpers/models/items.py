"""Multiple-choice items in the schemas of HellaSwag, OpenBookQA and ARC."""

import random
from dataclasses import dataclass
from pathlib import Path

from helpers.models.records import load_records, require_fields


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


def parse_item(record: dict, where: str) -> MultipleChoice:
    """An item in the schema of HellaSwag, OpenBookQA (`question_stem`) or ARC (`question`)."""
    if "choices" in record:
        stem = "question_stem" if "question_stem" in record else "question"
        require_fields(record, (stem, "choices", "answerKey"), where)
        labels, endings = list(record["choices"]["label"]), tuple(record["choices"]["text"])
        if record["answerKey"] not in labels:
            raise ValueError(f"{where}: answerKey {record['answerKey']!r} is none of its choices {labels}")
        context = record[stem].strip()
        # ARC's questions end as questions do; a cue makes their choices read on.
        context = context if stem == "question_stem" else f"Question: {context}\nAnswer:"
        return MultipleChoice(context, endings, labels.index(record["answerKey"]))
    require_fields(record, ("ctx", "endings", "label"), where)
    endings, label = tuple(record["endings"]), str(record["label"])
    if not label.isdigit() or int(label) >= len(endings):
        raise ValueError(f"{where}: label {record['label']!r} is not an index into its {len(endings)} endings")
    return MultipleChoice(record["ctx"].strip(), endings, int(label))


def load_multiple_choice(source: str | Path, split: str | None = None) -> list[MultipleChoice]:
    """Items from a local JSONL file, else from the hub data set of that name, by default its split "validation".

    In the schema of HellaSwag (`ctx`, `endings`, `label`), OpenBookQA or ARC. A hub configuration is named after a
    colon: `allenai/ai2_arc:ARC-Challenge`. Splits and errors as in `load_records`.
    """
    return load_records(source, parse_item, split, "validation")


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
