"""The adapter for the Language Model Evaluation Harness: without rounding nothing changes, and with it something."""

import json

import pandas as pd
import pytest
import torch
from conftest import tiny_model

pytest.importorskip("lm_eval", reason="the Language Model Evaluation Harness is optional: pip install -e .[harness]")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from helpers.evaluation.harness import command
from helpers.evaluation.harness.adapter import WHOLE, PackedLM
from helpers.evaluation.harness.local_tasks import local_task
from helpers.evaluation.harness.measuring import harness_table, item_scores
from helpers.evaluation.methods import FullPrecision, PackedMethod
from helpers.policies import EntropyRule, FixedBits
from helpers.policies.schedules import MIDDLE_SCHEDULE, AgeSchedule
from helpers.training.tokenizer import train_tokenizer

WORDS = "the cat sat on the mat and looked at a dog that ran over the hill to its old house by the sea"  # fmt: skip
WORDS = WORDS.split()
CONTEXT = " ".join(WORDS * 4)
PAIRS = [
    (CONTEXT, " the cat"), (CONTEXT, " the dog ran over the sea and sat"), (CONTEXT, " a house"),
    ("the dog", " sat on the mat"), (CONTEXT + " the hill", " " + " ".join(WORDS * 12)),
    (CONTEXT, " " + " ".join(WORDS[::-1] * 11)),
]  # fmt: skip
METHODS = {
    "static": PackedMethod(FixedBits(2)),
    "rule": PackedMethod(EntropyRule((3.9, 4.1, 4.25))),
    "schedule": PackedMethod(AgeSchedule(*MIDDLE_SCHEDULE)),
}


@pytest.fixture(scope="module")
def pair():
    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, vocab_size=300)
    tokenizer.padding_side = "left"
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 2048
    return model, tokenizer


def ask(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def answers(asked: HFLM) -> dict[str, list]:
    written = ask("generate_until", [(text, {"until": ["zz"], "max_gen_toks": 9}) for text, _ in PAIRS[2:5]])
    return {
        "scored": asked.loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True),
        "rolling": asked.loglikelihood_rolling(ask("loglikelihood_rolling", [(CONTEXT,)]), disable_tqdm=True),
        "written": asked.generate_until(written, disable_tqdm=True),
    }


def test_full_precision_is_the_harness_itself(pair):
    plain = answers(HFLM(pretrained=pair[0], tokenizer=pair[1], backend="causal"))
    ours = answers(PackedLM(*pair))
    assert max(len(pair[1](text)["input_ids"]) for _, text in PAIRS) > WHOLE
    for (expected, greedy), (actual, same) in zip(plain["scored"], ours["scored"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert same == greedy
    assert ours["rolling"] == pytest.approx(plain["rolling"], rel=1e-5)
    assert ours["written"] == plain["written"]
    assert all(plain["written"])


def test_the_librarys_own_route_measures_nothing_quantized_and_this_one_does(pair):
    """With the library's quantized cache chosen for generation, `HFLM` gives the very same numbers as without."""
    model, tokenizer = pair
    plain = answers(HFLM(pretrained=model, tokenizer=tokenizer, backend="causal"))
    model.generation_config.cache_implementation = "quantized"
    try:
        stock = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal")
        assert stock.loglikelihood(ask("loglikelihood", PAIRS), disable_tqdm=True) == plain["scored"]
    finally:
        model.generation_config.cache_implementation = None
    ours = answers(PackedLM(*pair, PackedMethod(FixedBits(2))))
    for number, ((expected, _), (actual, _)) in enumerate(zip(plain["scored"], ours["scored"], strict=True)):
        if PAIRS[number][0] != "the dog":  # whose context is shorter than a block
            assert actual != pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", METHODS)
def test_every_policy_answers_alike_for_any_batch(pair, name):
    one, three = (answers(PackedLM(*pair, METHODS[name], batch_size=size)) for size in (1, 3))
    assert one["scored"] == three["scored"]
    assert [len(text) > 0 for text in three["written"]] == [True] * 3
    assert all(torch.isfinite(torch.tensor(value)) for value, _ in one["scored"])


def test_a_continuation_without_room_for_a_context_is_refused(pair):
    with pytest.raises(ValueError, match="must leave room for its context within 8 tokens"):
        PackedLM(*pair, max_length=8)._loglikelihood_tokens([(None, [3], list(range(3, 12)))], disable_tqdm=True)


@pytest.fixture
def folder(tmp_path):
    """Files in the sets' formats, HellaSwag's as the harness needs it."""
    hellaswag = [
        {"activity_label": "Cats", "ctx_a": CONTEXT, "ctx_b": "the cat", "ctx": CONTEXT, "label": str(number % 2),
         "endings": [" ".join(WORDS[number:]), " ".join(WORDS[: number + 2])]}
        for number in range(6)
    ]  # fmt: skip
    books = [
        {"ctx": f"{CONTEXT} {word}", "endings": WORDS[:4], "label": str(i % 4)} for i, word in enumerate(WORDS[:5])
    ]
    for name, rows in (("hellaswag_validation", hellaswag), ("openbook_qa_test", books)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pages = [f" = Page {number} = \n the cat @-@ sat on the mat . " + " ".join(WORDS * 4) for number in range(4)]
    (tmp_path / "wiki.test.raw").write_text("\n".join(pages), encoding="utf-8")
    return tmp_path


def test_tasks_over_files_carry_the_harness_name_only_where_they_are_its_own(folder):
    names = {name: local_task(name, str(folder), 3).config.task for name in ("hellaswag", "openbookqa", "wikitext")}
    assert names == {"hellaswag": "hellaswag", "openbookqa": "openbookqa_ctx", "wikitext": "wikitext_articles"}
    (document, *others) = local_task("hellaswag", str(folder), 3).test_docs()
    assert len(others) == 2
    assert document["context"].startswith("Cats: the cat sat")
    assert "@-@" not in local_task("wikitext", str(folder)).doc_to_target({"page": "cat @-@ dog"})
    with pytest.raises(ValueError, match="tasks over files are hellaswag, openbookqa, wikitext; got 'arc'"):
        local_task("arc", str(folder))


def test_the_table_has_intervals_and_paired_changes(pair, folder):
    tasks = {task.config.task: task for task in (local_task(name, str(folder)) for name in ("openbookqa", "wikitext"))}
    methods = [FullPrecision(), PackedMethod(FixedBits(8)), PackedMethod(FixedBits(2))]
    table = harness_table(*pair, tasks, methods)
    assert list(table.groupby("metric").size()) == [3, 3, 3]
    assert (table.low <= table.value).all()
    assert (table.value <= table.high).all()
    assert (table[table.method == "full precision"].change == 0).all()
    words = table[table.metric == "word_perplexity"].set_index("method")
    ratio = words.value / words.value["full precision"] - 1
    assert ratio.to_numpy() == pytest.approx(words.change.to_numpy(), rel=1e-9)
    assert abs(words.change["static 2-bit"]) > abs(words.change["static 8-bit"])
    scores = item_scores(*pair, tasks, methods[0])
    assert scores["wikitext_articles", "word_perplexity"].shape == (2, 2)  # of 4 pages: the first half is for training
    assert scores["openbookqa_ctx", "acc"].shape == (3,)


def test_the_command_writes_a_table_a_task(tiny_folder, folder, tmp_path, capsys):
    options = command.HarnessOptions(
        model=str(tiny_folder), texts_dir=str(folder), tasks=("openbookqa",), bits=(2,), limit=4,
        out=str(tmp_path / "table.csv"),
    )  # fmt: skip
    command.harness(options)
    table = pd.read_csv(tmp_path / "table.csv")
    assert list(table.method) == ["full precision"] * 2 + ["static 2-bit"] * 2
    assert "openbookqa_ctx" in capsys.readouterr().out


def test_without_the_harness_the_command_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e .\[harness\]"):
        command.harness(command.HarnessOptions())
