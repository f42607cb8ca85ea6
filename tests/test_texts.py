"""Texts in the official formats: a folder in place of the hub, splits that never overlap, the harness's HellaSwag."""

import gzip
import json

import pandas as pd
import pytest

import main
from helpers.models import (
    TEXT_FILES,
    get_preset,
    hub,
    load_articles,
    load_multiple_choice,
    load_paragraphs,
    load_stories,
)
from helpers.models.hub import HubError
from helpers.models.items import parse_item
from helpers.models.presets import PRESETS
from helpers.models.sequences import take_sequences
from helpers.models.splits import split_holdout
from helpers.models.stories import load_last
from helpers.models.text_files import find_file
from helpers.training.tokenizer import train_tokenizer

WORDS = ["the cat sat on the mat", "a dog ran to the door", "rain fell on the old house", "she sang to the small bird"]
LONG = "the cat sat on the mat and a dog ran to the door . " * 30
HELLASWAG = {
    "ind": 24, "activity_label": "Roof repair", "ctx_a": "A man is on a roof.", "ctx_b": "he", "label": 1,
    "ctx": "A man is on a roof. he", "endings": ["swims.", "pulls [step] up a tile.", "flies.", "sings."],
    "split": "val", "split_type": "indomain", "source_id": "activitynet~v_x",
}  # fmt: skip
ARC = {"id": "Mercury_1", "question": {"stem": "What is up?", "choices": [
    {"text": "sky", "label": "A"}, {"text": "sea", "label": "B"}]}, "answerKey": "B"}  # fmt: skip


def wiki(articles: int, body: str = "", blank: str = " \n") -> str:
    parts = [
        f" = Title {i} = \n{blank} Lead {i} of {WORDS[i % 4]} . {body}\n{blank} = = Part = = \n{blank} More {i} . \n"
        for i in range(articles)
    ]
    return blank + "".join(parts)


def records(kind: str, count: int) -> list[dict]:
    if kind == "hellaswag":
        return [HELLASWAG | {"ind": i, "ctx_a": f"Man {i} is on a roof. {LONG}"} for i in range(count)]
    if kind == "plain items":
        return [{"ctx": f"Man {i} is here. {LONG}", "endings": ["so", "not"], "label": "0"} for i in range(count)]
    return [{"id": str(i), "article": f"News {i}. {LONG}", "highlights": f"Short {i}."} for i in range(count)]


def write(path, kind: str, count: int = 40):
    """A file of `count` articles, stories or items in the format `kind`."""
    if kind == "wikitext":
        text = wiki(count, LONG)
    elif kind == "stories":
        text = "\n<|endoftext|>\n".join(f"Story {i}. {LONG}" for i in range(count))
    elif kind == "paragraphs":
        text = "\n\n".join(f"Paragraph {i}.\n{LONG}" for i in range(count))
    else:
        text = "".join(json.dumps(record) + "\n" for record in records(kind, count))
    path.write_text(text, encoding="utf-8")
    return path


FORMATS = {"wikitext": "w.raw", "stories": "s.txt", "paragraphs": "p.txt", "hellaswag": "h.jsonl",
           "plain items": "i.jsonl", "news": "n.jsonl"}  # fmt: skip
SETS = {"hellaswag_val.jsonl": "hellaswag", "wiki.test.raw": "wikitext", "cnn_dailymail_test.jsonl": "news",
        "tinystories_sample.txt": "stories"}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of texts with one file of each set that the presets of the hub name."""
    (tmp_path / "texts").mkdir()
    for name, kind in SETS.items():
        write(tmp_path / "texts" / name, kind)
    monkeypatch.setattr(hub, "_download", lambda *arguments: pytest.fail("the hub was asked"))
    return tmp_path / "texts"


@pytest.mark.parametrize("kind", FORMATS)
def test_training_and_testing_share_no_text_of_a_plain_file(tmp_path, kind):
    path = str(write(tmp_path / FORMATS[kind], kind))
    whole, train, test = (load_stories(path, split) for split in (None, "train", "validation"))
    assert train + test == whole, "cut in file order, nothing lost, nothing twice"
    assert len(whole) == len(set(whole)) == 40
    assert len(test) == (20 if path.endswith("jsonl") else 4)
    unit = {"wikitext": "article", "stories": "story", "paragraphs": "paragraph"}.get(kind, "record")
    assert train.split == f"by {unit}, the first {len(train)} of 40 in {FORMATS[kind]}"
    assert load_stories(path, "test") == test
    last = load_last(path, 0.1, "test")
    assert (last, last.split) == (whole[-4:], f"the last 4 of 40 in {FORMATS[kind]}")
    if kind != "news":
        assert not set(load_paragraphs(path, "train")) & set(load_paragraphs(path, "test"))
    else:
        parts = [[each.article for each in load_articles(path, split)] for split in ("train", "test")]
        assert parts == [train, test]
        assert len(load_articles(path, "test", cut=False)) == 40
    if kind in ("hellaswag", "plain items"):
        parts = [load_multiple_choice(path, split) for split in ("train", "validation")]
        assert [[item.text for item in part] for part in parts] == [train, test]
        assert parts[1].split == f"by item, the last 20 of 40 in {FORMATS[kind]}"


def test_records_that_name_two_splits_are_told_apart_by_them(tmp_path):
    path = tmp_path / "i.jsonl"
    lines = [{"ctx": str(i), "endings": ["a"], "label": 0, "split": of} for i, of in enumerate(["val", "train"] * 3)]
    path.write_text("\n".join(map(json.dumps, [*lines, {"ctx": "6", "endings": ["a"], "label": 0}])))
    chosen = {split: [i.context for i in load_multiple_choice(path, split)] for split in ("train", "validation")}
    assert chosen == {"train": ["1", "3", "5", "6"], "validation": ["0", "2", "4"]}
    assert "by the split that each record names, 3 of 7" in load_multiple_choice(path, "dev").split
    with pytest.raises(ValueError, match="holds no items of split 'test'"):
        load_multiple_choice(path, "test")


def test_what_cannot_be_split_is_told(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("One line.\nAnother.\n")
    with pytest.raises(ValueError, match=r"one.txt: 1 paragraph cannot be split in two, .* blank lines"):
        load_stories(str(path), "train")
    with pytest.raises(ValueError, match=r"1 text\(s\) cannot be split"):
        split_holdout(["one"])
    twice = tmp_path / "twice.txt"
    twice.write_text("Same.\n\nSame.\n")
    with pytest.raises(ValueError, match=r"twice\.txt: every paragraph of its training part stands"):
        load_stories(str(twice), "train")
    with pytest.raises(ValueError, match="last must lie above 0 and be at most 1, got 2"):
        load_last(str(path), 2, "test")


@pytest.mark.parametrize("blank", [" \n", ""])
def test_articles_begin_at_titles_of_the_first_level(tmp_path, blank):
    path = tmp_path / "wiki.txt"
    path.write_text(wiki(3, blank=blank))
    texts = load_stories(str(path))
    assert [text.splitlines()[0].strip() for text in texts] == ["= Title 0 =", "= Title 1 =", "= Title 2 ="]
    assert all("= = Part = =" in text for text in texts)
    assert load_paragraphs(str(path), None)[:2] == ["Lead 0 of the cat sat on the mat .", "More 0 ."]


def test_rows_of_the_hub_are_joined_and_cut_like_the_file(tmp_path, monkeypatch):
    from helpers.models import records as module

    rows = [{"text": line + "\n" if line.strip() else ""} for line in wiki(3).splitlines()]
    monkeypatch.setattr(module, "fetch_dataset", lambda source, split: rows)
    texts = load_stories("Salesforce/wikitext:wikitext-2-raw-v1", "validation")
    assert [text.splitlines()[0].strip() for text in texts] == ["= Title 0 =", "= Title 1 =", "= Title 2 ="]
    assert texts.split == "the hub's split validation"
    assert load_paragraphs("Salesforce/wikitext:wikitext-2-raw-v1") == [
        line for i in range(3) for line in (f"Lead {i} of {WORDS[i]} .", f"More {i} .")
    ]
    monkeypatch.setattr(module, "fetch_dataset", lambda source, split: [{"text": "One.\nTwo."}, {"text": " "}])
    assert load_stories("roneneldan/TinyStories") == ["One.\nTwo."]


@pytest.mark.parametrize(
    ("there", "train", "validation", "test"),
    [
        (["train", "validation", "test"], "train", "validation", "test"),
        (["train", "test"], "train", "test", "test"),
        (["train"], "train, shared", "train, shared", "train, shared"),
        (["test"], "test, shared", "test, shared", "test, shared"),
        (["validation", "test"], "validation, shared", "validation, shared", "test"),
    ],
)
def test_a_file_is_shared_only_where_it_must_be(tmp_path, there, train, validation, test):
    name = "Salesforce/wikitext:wikitext-2-raw-v1"
    for split in there:
        (tmp_path / TEXT_FILES[name][split][1]).write_text("x")
    for split, expected in {"train": train, "validation": validation, "test": test}.items():
        path, shared = find_file(str(tmp_path), name, split)
        assert f"{path.stem.removeprefix('wikitext2_raw_')}{', shared' * shared}" == expected


def test_presets_lead_to_the_folder(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTS_DIR", str(folder))
    preset = get_preset("smollm")
    parts = [load_multiple_choice(preset.multiple_choice, of) for of in (preset.train_split, preset.test_split)]
    sides = [f"by item, the {of} 20 of 40 in hellaswag_val.jsonl" for of in ("first", "last")]
    assert [part.split for part in parts] == sides
    assert not {item.text for item in parts[0]} & {item.text for item in parts[1]}
    assert {part.schema for part in parts} == {"hellaswag (harness)"}
    for source, unit in ((preset.stories, "story"), (preset.calibration, "article")):
        train, test = load_stories(source, "train"), load_stories(source, "validation")
        assert (len(train), len(test), len(set(train + test))) == (20, 20, 40)
        assert train.split.startswith(f"by {unit}, the first 20 of 40")
    tested = load_articles(preset.articles, "test")
    assert not {each.article for each in tested} & {each.article for each in load_articles(preset.articles, "train")}
    assert load_stories(preset.articles, "test") == [each.article for each in tested]
    write(folder / "wiki.train.raw", "wikitext", 6)
    assert load_stories(preset.calibration, "train").split == "all 6 of wiki.train.raw"
    assert load_stories(preset.calibration, "test").split == "all 40 of wiki.test.raw"
    assert load_stories(preset.stories) == load_stories(preset.stories, "train")
    with gzip.open(folder / "hellaswag_train.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records("hellaswag", 3)))
    assert load_multiple_choice(preset.multiple_choice, "train").split == "all 3 of hellaswag_train.jsonl.gz"
    assert get_preset("embedded") == PRESETS["embedded"], "its texts are files"
    other = tmp_path / "other"
    other.mkdir()
    assert get_preset("smollm", str(other)).stories == f"{other}/roneneldan/TinyStories", "the option wins"


def test_what_is_missing_in_the_folder_is_named_with_what_needs_it(folder, monkeypatch, capsys):
    (folder / "hellaswag_val.jsonl").unlink()
    monkeypatch.setenv("TEXTS_DIR", str(folder))
    message = (
        rf"TEXTS_DIR={folder}: found none of hellaswag_train.jsonl, hellaswag_validation.jsonl, hellaswag_val.jsonl, "
        r"which Rowan/hellaswag is read from \(the multiple-choice texts of preset smollm2, smollm, llama"
    )
    with pytest.raises(ValueError, match=message):
        load_multiple_choice(get_preset("smollm").multiple_choice, "train")
    assert load_stories(get_preset("smollm").stories, "train"), "what is there is read"
    monkeypatch.setenv("TEXTS_DIR", "nowhere")
    with pytest.raises(ValueError, match=r"TEXTS_DIR=nowhere: no such folder"):
        get_preset("smollm")
    monkeypatch.delenv("TEXTS_DIR")
    for command in ("collect", "gate-fidelity"):
        monkeypatch.setattr("helpers.models.loading.fetch_model", lambda source: pytest.fail("a model was loaded"))
        assert main.main([command, "--preset", "smollm", "--texts-dir", str(folder)]) == 1
        assert "found none of hellaswag_train.jsonl" in capsys.readouterr().err
    assert main.main(["train", "--texts-dir", "nowhere"]) == 1
    assert "--texts-dir=nowhere: no such folder" in capsys.readouterr().err


def test_neither_hub_nor_folder_is_told_before_a_model_is_loaded(monkeypatch, capsys):
    def refuse(kind, arguments, silence):
        raise hub._error("data set", arguments[0], "no data arrived")

    monkeypatch.setattr(hub, "_download", refuse)
    monkeypatch.delenv("TEXTS_DIR", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    for module in ("training.commands", "evaluation.commands", "gate.study.report", "gate.pairs"):
        monkeypatch.setattr(f"helpers.{module}.load_model", lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr("helpers.evaluation.commands.default_methods", lambda folder: [])
    with pytest.raises(HubError, match="set TEXTS_DIR to a folder"):
        load_stories("roneneldan/TinyStories")
    for command in ("collect", "train", "quality", "compare", "gate", "gate-fidelity"):
        assert main.main([command, "--preset", "smollm"]) == 1
        assert "set TEXTS_DIR to a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("record", "schema", "context", "endings"),
    [
        (HELLASWAG, "hellaswag (harness)", "Roof repair: A man is on a roof. He",
         ("swims.", "pulls up a tile.", "flies.", "sings.")),
        (HELLASWAG | {"activity_label": "Home", "ctx_a": "[header] How to paint [title] Buy  paint. [step] Go.",
                      "ctx_b": "", "endings": [" [title] Sand it. ", "b", "c", "d"]}, "hellaswag (harness)",
         "Home: How to paint. Buy paint. Go.",
         (" Sand it.", "b", "c", "d")),
        ({k: v for k, v in HELLASWAG.items() if k not in ("ctx_a", "ctx_b")}, "hellaswag, activity_label: ctx",
         "Roof repair: A man is on a roof. he", ("swims.", "pulls up a tile.", "flies.", "sings.")),
        ({"ctx": " A [x] man ", "endings": ["a [y]", "b"], "label": 0}, "ctx alone", "A [x] man", ("a [y]", "b")),
        (ARC, "arc", "Question: What is up?\nAnswer:", ("sky", "sea")),
        (ARC | {"id": "7-980"}, "openbookqa", "What is up?", ("sky", "sea")),
    ],
)  # fmt: skip
def test_items_are_read_as_the_harness_reads_them(record, schema, context, endings):
    item, found = parse_item(record, "here")
    assert (found, item.context, item.endings) == (schema, context, endings)
    assert item.text == f"{context} {endings[item.label]}"


def test_sequences_are_evenly_spaced():
    texts = [f"{WORDS[i % 4]} {i} " * 8 for i in range(40)]
    tokenizer = train_tokenizer(texts, vocab_size=300)
    every = take_sequences(tokenizer, texts, 16, 10**6)
    assert take_sequences(tokenizer, texts, 16, 4) == [every[i * len(every) // 4] for i in range(4)]
    assert len(take_sequences(tokenizer, texts * 200, 16, 2)) == 2
    with pytest.raises(ValueError, match="no text to read"):
        take_sequences(tokenizer, [], 16, 1)
    for bad, message in (((10**6, 1), "less than 1000000 tokens"), ((16, 0), "must be 1 or more, got 0")):
        with pytest.raises(ValueError, match=message):
            take_sequences(tokenizer, texts, *bad)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_command_takes_every_format(tiny_folder, tmp_path, monkeypatch, kind):
    from helpers.evaluation import fixed_widths
    from helpers.evaluation.methods import FullPrecision, Group
    from helpers.training import commands

    monkeypatch.setattr(fixed_widths, "SAMPLED_METHODS", fixed_widths.SAMPLED_METHODS[2:3])
    monkeypatch.setattr(fixed_widths, "TEXT_METHODS", fixed_widths.TEXT_METHODS[1:2])
    monkeypatch.setattr("helpers.evaluation.commands.default_methods", lambda f: [Group("full", [FullPrecision()])])
    monkeypatch.setattr(commands, "train_controllers", lambda *arguments: pd.DataFrame())
    path = write(tmp_path / FORMATS[kind], kind)
    common = ["--model", str(tiny_folder), "--texts", str(path), "--out"]
    items = path if kind in ("hellaswag", "plain items") else write(tmp_path / "items.jsonl", "hellaswag")
    told = {}
    for command, out, more in (
        ("collect", "c.csv", ["--count", "2", "--max-tokens", "12"]),
        ("train", "controllers", ["--rows", "1"]),
        ("quality", "q.csv", ["--sequences", "1", "--max-rows", "1"]),
        ("compare", ".", ["--items", str(items), "--count", "2", "--max-rows", "1", "--rounds", "0", "--name", "b"]),
    ):
        assert main.main([command, *common, str(tmp_path / out), *more]) == 0
        result = {"train": "controllers/collected.json", "compare": "b.json"}.get(command, f"{out[0]}.json")
        told[command] = json.loads((tmp_path / result).read_text())
    held = 20 if path.suffix == ".jsonl" else 4
    assert told["collect"]["split"] == told["train"]["split"]
    assert told["train"]["split"].endswith(f"the first {40 - held} of 40 in {path.name}")
    assert told["compare"]["split"].endswith(f"the last {held} of 40 in {path.name}")
    assert told["quality"]["split"].startswith("the last 4 of 40")
    assert told["compare"]["items_split"] == f"by item, the last 20 of 40 in {items.name}"
    assert told["compare"]["items_schema"] == ("ctx alone" if kind == "plain items" else "hellaswag (harness)")


def test_the_real_files_stand_in_for_the_hub(shared):
    preset = get_preset("smollm", str(shared / "data"))
    items = {of: load_multiple_choice(preset.multiple_choice, of) for of in ("train", "validation")}
    assert sum(map(len, items.values())) == 5020
    assert items["train"].split.endswith(", less 1 that testing reads too"), "one text stands there twice"
    assert not {item.text for item in items["train"]} & {item.text for item in items["validation"]}
    assert items["train"].schema == "hellaswag, activity_label: ctx"
    assert all(ending.strip() for part in items.values() for item in part for ending in item.endings)
    assert not any(mark in item.context for item in items["train"] for mark in ("[header]", "[title]", "[step]"))
    assert {len(load_stories(preset.calibration, of)) for of in ("train", "test")} == {31}
    assert len(load_stories(preset.stories, "train")) == 1158
    assert [len(load_articles(preset.articles, of)) for of in ("train", "test")] == [250, 250]
    assert load_multiple_choice(f"{shared}/data/allenai/openbookqa", "test").schema == "ctx alone"
