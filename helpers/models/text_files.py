"""The files of a folder that stand in for data sets of the hub: which names are looked for, and in which of them.

The folder is the option `--texts-dir` of the commands or the variable TEXTS_DIR. For each data set and split,
`TEXT_FILES` lists the names that are looked for, the first that is there being read: those of the sets' own releases,
and `SET_SPLIT`. Any of them may also be gzipped (`NAME.gz`). What the files hold: HellaSwag, OpenBookQA and ARC a JSON
object a line, with the fields of the release or of the hub; CNN/DailyMail the same, with `article` and `highlights`;
WikiText-2 raw text with ` = Title = ` headings; TinyStories raw text with `<|endoftext|>` between stories.
"""

import os
from pathlib import Path

ARC_SPLITS = {"train": "Train", "validation": "Dev", "test": "Test"}
SPLITS = tuple(ARC_SPLITS)

# Hub name -> split -> names of files.
TEXT_FILES: dict[str, dict[str, tuple[str, ...]]] = {
    "Rowan/hellaswag": {
        "train": ("hellaswag_train.jsonl",),
        "validation": ("hellaswag_validation.jsonl", "hellaswag_val.jsonl"),
    },
    "Salesforce/wikitext:wikitext-2-raw-v1": {
        "train": ("wiki.train.raw", "wikitext2_raw_train.txt"),
        "validation": ("wiki.valid.raw", "wikitext2_raw_validation.txt"),
        "test": ("wiki.test.raw", "wikitext2_raw_test.txt"),
    },
    "abisee/cnn_dailymail:3.0.0": {split: (f"cnn_dailymail_{split}.jsonl",) for split in SPLITS},
    "roneneldan/TinyStories": {
        "train": ("TinyStoriesV2-GPT4-train.txt", "TinyStories-train.txt", "tinystories_sample.txt"),
        "validation": ("TinyStoriesV2-GPT4-valid.txt", "TinyStories-valid.txt"),
    },
    "allenai/openbookqa": {split: (f"openbook_qa_{split}.jsonl",) for split in SPLITS},
    **{
        f"allenai/ai2_arc:{name}": {split: (f"{name}-{part}.jsonl",) for split, part in ARC_SPLITS.items()}
        for name in ("ARC-Challenge", "ARC-Easy")
    },
}


def texts_folder(folder: str | None = None) -> str | None:
    """The folder of texts: `folder`, else the variable TEXTS_DIR, else None. Raises `ValueError` where it is none."""
    named = "--texts-dir" if folder else "TEXTS_DIR"
    folder = folder or os.environ.get("TEXTS_DIR") or None
    if folder and not Path(folder).is_dir():
        raise ValueError(f"{named}={folder}: no such folder; it must hold the files that stand in for the hub's texts")
    return folder


def in_folder(source: str, folder: str | None = None) -> str:
    """`FOLDER/HUB NAME` for a name of `TEXT_FILES` where there is a `texts_folder`, else `source` as it is.

    That the files are there is checked when the texts are read.
    """
    folder = texts_folder(folder)
    return f"{folder.rstrip('/') or '/'}/{source}" if folder and source in TEXT_FILES else source


def split_folder(source: str) -> tuple[str, str] | None:
    """Folder and hub name of what `in_folder` made, None for any other source."""
    if Path(source).is_dir():  # a clone of the hub's repository
        return None
    found = (name for name in TEXT_FILES if source.endswith(f"/{name}"))
    return next(((source.removesuffix(f"/{name}"), name) for name in found), None)


def find_file(folder: str, name: str, split: str) -> tuple[Path, bool] | None:
    """The file that `split` of the set `name` is read from, and whether training and testing have to share it.

    They do where the set's training file is not there, or where no other is. None where there is no file at all.
    """
    there = {}
    for of, names in TEXT_FILES[name].items():
        paths = [Path(folder) / f"{file}{end}" for file in names for end in ("", ".gz")]
        if path := next((path for path in paths if path.is_file()), None):
            there[of] = path
    if not there:
        return None
    testing = [of for of in there if of != "train"]
    learnt = "train" if "train" in there else testing[0]
    tested = split if split in testing else (testing or ["train"])[0]
    chosen = learnt if split == "train" else tested
    return there[chosen], chosen == learnt and (learnt != "train" or not testing)
