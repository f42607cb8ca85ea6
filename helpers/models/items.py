"""Multiple-choice items in the schemas of HellaSwag, OpenBookQA and ARC."""

import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from helpers.models.records import load_records, require_fields
from helpers.models.splits import Part

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


def _schema(record: dict) -> str:
    """The schema of a flat record, and for HellaSwag the variant of the context, which scores depend on."""
    if "choices" in record:
        return "openbookqa" if "question_stem" in record else "arc"
    if {"activity_label", "ctx_a", "ctx_b"} <= record.keys():
        return "hellaswag (harness)"
    return "hellaswag, activity_label: ctx" if "activity_label" in record else "ctx alone"


def parse_item(record: dict, where: str) -> tuple[MultipleChoice, str]:
    """An item in the schema of HellaSwag, OpenBookQA (`question_stem`) or ARC (`question`), and what it was read as.

    With HellaSwag's `activity_label`, `ctx_a` and `ctx_b`, context and endings are those of the task `hellaswag` of the
    Language Model Evaluation Harness; without the latter two, the context is `activity_label: ctx`.
    """
    record = _flat(record, where)
    schema = _schema(record)
    if "choices" in record:
        stem = "question_stem" if "question_stem" in record else "question"
        require_fields(record, (stem, "choices", "answerKey"), where)
        labels, endings = list(record["choices"]["label"]), tuple(record["choices"]["text"])
        if record["answerKey"] not in labels:
            raise ValueError(f"{where}: answerKey {record['answerKey']!r} is none of its choices {labels}")
        context = record[stem].strip()
        # ARC's questions end as questions do; a cue makes their choices read on.
        context = context if stem == "question_stem" else f"Question: {context}\nAnswer:"
        return MultipleChoice(context, endings, labels.index(record["answerKey"])), schema
    fields = ("ctx_a", "ctx_b") if schema == "hellaswag (harness)" else ("ctx",)
    require_fields(record, (*fields, "endings", "label"), where)
    endings, label = tuple(record["endings"]), str(record["label"])
    if not label.isdigit() or int(label) >= len(endings):
        raise ValueError(f"{where}: label {record['label']!r} is not an index into its {len(endings)} endings")
    if schema == "ctx alone":
        return MultipleChoice(record["ctx"].strip(), endings, int(label)), schema
    begun = record["ctx"] if fields == ("ctx",) else f"{record['ctx_a']} {record['ctx_b'].capitalize()}"
    context, *endings = map(_clean, (f"{record['activity_label']}: {begun}", *endings))
    return MultipleChoice(context, tuple(endings), int(label)), schema


def _clean(text: str) -> str:
    """HellaSwag's texts without the marks of WikiHow's pages, step by step as the harness does it."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _flat(record: dict, where: str) -> dict:
    """A record of OpenBookQA's or ARC's own release, which holds stem and choices in `question`, as the hub has it."""
    question = record.get("question")
    if not isinstance(question, dict):
        return record
    require_fields(question, ("stem", "choices"), where)
    choices = {name: [choice[name] for choice in question["choices"]] for name in ("label", "text")}
    # Their records differ in nothing but the ids: OpenBookQA's are two numbers ("7-980"), ARC's begin with a source.
    stem = "question_stem" if re.fullmatch(r"\d+-\d+", str(record.get("id"))) else "question"
    rest = {name: value for name, value in record.items() if name != "question"}
    return rest | {stem: question["stem"], "choices": choices}


def load_multiple_choice(source: str | Path, split: str | None = None) -> Part[MultipleChoice]:
    """Items from a local JSONL file, a folder of texts or the hub data set of that name, by default its "validation".

    In the schema of HellaSwag (`ctx`, `endings`, `label`), OpenBookQA or ARC, which `Part.schema` names. A hub
    configuration is named after a colon: `allenai/ai2_arc:ARC-Challenge`. Splits and errors as in `load_records`.
    """
    part = load_records(source, parse_item, split, "validation", "item", content=lambda pair: pair[0].text)
    return Part([item for item, _ in part], part.split, "; ".join(sorted({schema for _, schema in part})))


def sample_items(items: list[T], count: int, seed: int = 0) -> list[T]:
    """`count` different items (or texts) in seeded random order; the first of a set are often alike (HellaSwag's are).

    Raises `ValueError` where there are fewer items.
    """
    if not 0 < count <= len(items):
        raise ValueError(f"count must lie between 1 and the number of items ({len(items)}), got {count}")
    return random.Random(seed).sample(items, count)


def sample_texts(items: list[MultipleChoice], count: int, seed: int = 0) -> list[str]:
    """`sample_items`, each as context and true ending."""
    return [item.text for item in sample_items(items, count, seed)]
