"""Tasks of the harness over files in the sets' own formats, in place of the hub.

The files are those of `helpers.models.text_files`. A task carries the harness's name where the files hold all that its
text is made of; else it is a variant, and named so.
"""

from collections.abc import Callable, Sequence

from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks.wikitext import preprocess_wikitext

from helpers.models import Part, in_folder, load_multiple_choice, load_stories, sample_items

HELLASWAG, OPENBOOKQA, WIKITEXT = "hellaswag", "openbookqa", "wikitext"
LOCAL_TASKS = {
    HELLASWAG: ("Rowan/hellaswag", "validation"),
    OPENBOOKQA: ("allenai/openbookqa", "test"),
    WIKITEXT: ("Salesforce/wikitext:wikitext-2-raw-v1", "test"),
}
OFFICIAL = {HELLASWAG: "hellaswag (harness)", OPENBOOKQA: "openbookqa"}  # schemas that hold all of the task's text


def local_task(name: str, folder: str | None = None, limit: int | None = None, seed: int = 0) -> ConfigurableTask:
    """The task `name` of `LOCAL_TASKS` over the files in `folder` (default: TEXTS_DIR), `limit` items drawn at random.

    Raises `ValueError` for another name, and as the loaders do.
    """
    if name not in LOCAL_TASKS:
        raise ValueError(f"tasks over files are {', '.join(LOCAL_TASKS)}; got {name!r}")
    source, split = LOCAL_TASKS[name]
    source = in_folder(source, folder)
    found = load_stories(source, split) if name == WIKITEXT else load_multiple_choice(source, split)
    items = sample_items(found, min(limit or len(found), len(found)), seed)
    return _documents(items) if name == WIKITEXT else _choices(_variant(name, found), items)


def _variant(name: str, found: Part) -> str:
    return name if found.schema == OFFICIAL[name] else f"{name}_ctx"  # of the field that their context comes from


def _choices(name: str, items: Sequence) -> ConfigurableTask:
    rows = [{"context": item.context, "endings": list(item.endings), "label": item.label} for item in items]
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return _task(
        name, rows, output_type="multiple_choice", doc_to_text="{{context}}", doc_to_target="label",
        doc_to_choice="{{endings}}", metric_list=metrics,
    )  # fmt: skip


def _documents(texts: Sequence[str]) -> ConfigurableTask:
    """Word perplexity of whole articles, cleaned of WikiText's marks as the harness does it."""
    return _task(
        "wikitext_articles", [{"page": text} for text in texts], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target=preprocess_wikitext.wikitext_detokenizer, process_results=preprocess_wikitext.process_results,
        metric_list=[{"metric": metric} for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )  # fmt: skip


def _task(name: str, rows: list[dict], **config) -> ConfigurableTask:
    data: Callable[..., DatasetDict] = lambda **_: DatasetDict({"test": Dataset.from_list(rows)})  # noqa: E731
    return ConfigurableTask(config={"task": name, "custom_dataset": data, "test_split": "test", **config})
