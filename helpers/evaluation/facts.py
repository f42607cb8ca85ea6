"""Facts in a long text: does a model still find what stands thousands of tokens back, once it is packed?

Running text with some notes in it, evenly spread: a name and the word that goes with it, twice ("Oslo -> banana").
After it each name is said once more, and its word is found if the model holds it likelier than the words of the text's
other names; one of k is found by chance. All are asked of one reading: the text is read and committed once, and the
questions are rows of one batch over what the cache made of it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.bootstrap import bootstrap_groups
from helpers.evaluation.methods import Method
from helpers.evaluation.multiple_choice import read_endings
from helpers.models import check_context, encode
from helpers.policies.features import log_probabilities, surprisal_of

NAMES = (
    "Oslo", "Cairo", "Lima", "Delhi", "Paris", "Tokyo", "Quito", "Sofia", "Dakar", "Seoul", "Turin", "Perth", "Miami",
    "Hanoi", "Kyiv", "Accra",
)  # fmt: skip
WORDS = (
    "banana", "violin", "hammer", "candle", "pepper", "blanket", "tiger", "lemon", "anchor", "pillow", "rocket",
    "butter", "ladder", "saddle", "trumpet", "walnut",
)  # fmt: skip
COLUMNS = ("method", "length", "number", "depth", "found")  # number: of the text


@dataclass(frozen=True)
class FactText:
    """A text with facts in it, and for each fact the tokens that ask for it, those that answer, and its depth."""

    ids: list[int]
    questions: list[list[int]]  # two tokens or more each
    answers: list[list[int]]
    depths: list[float]  # share of the text that stands before the fact


def fact_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, texts_wanted: int, facts: int, seed: int = 0
) -> list[FactText]:
    """`texts_wanted` different texts of `length` tokens, each with `facts` facts of their own.

    What fills them is cut from `texts`, in order. Raises `ValueError` where these are too short, or for facts that do
    not fit.
    """
    if not 1 <= facts <= len(NAMES):
        raise ValueError(f"facts must lie between 1 and {len(NAMES)}, got {facts}")
    filler = [token for text in texts for token in encode(tokenizer, text)]
    draw, made, at = random.Random(seed), [], 0
    for _ in range(texts_wanted):
        names = draw.sample(NAMES, facts)
        words = draw.sample(WORDS, facts)
        questions = [_tokens(tokenizer, f"\n{name} ->") for name in names]
        answers = [_tokens(tokenizer, f" {word}") for word in words]
        pairs = zip(names, words, strict=True)
        notes = [_tokens(tokenizer, f"\n{name} -> {word}" * 2 + "\n") for name, word in pairs]
        room = length - sum(map(len, notes))
        if room < facts:
            raise ValueError(f"length must leave room for {facts} facts, got {length} tokens")
        if at + room > len(filler):
            raise ValueError(f"the texts have {len(filler)} tokens, fewer than {texts_wanted} texts of {length} need")
        cuts = [round(room * (i + 0.5) / facts) for i in range(facts)]
        ids, depths, before = [], [], 0
        for note, cut in zip(notes, cuts, strict=True):
            ids += filler[at + before : at + cut]
            depths.append(len(ids) / length)
            ids, before = ids + note, cut
        made.append(FactText(ids + filler[at + before : at + room], questions, answers, depths))
        at += room
    return made


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def found_facts(model: PreTrainedModel, text: FactText, method: Method, number: int = 0) -> list[bool]:
    """Which facts of a text the model finds, the text being read and committed through a cache of `method`."""
    check_context(model, len(text.ids), max(map(len, text.questions)) + max(map(len, text.answers)))
    cached = method.open(model, number)
    cached.read(torch.tensor([text.ids], device=model.device), keep=1)
    rows = [question + answer for question in text.questions for answer in text.answers]
    width = max(map(len, rows))
    asked = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    log_p = -surprisal_of(log_probabilities(read_endings(cached, asked)), asked[:, 1:])
    count, found = len(text.answers), []
    for number, question in enumerate(text.questions):
        each = zip(log_p[number * count : (number + 1) * count], text.answers, strict=True)
        sums = [log[len(question) - 1 : len(question) - 1 + len(answer)].sum().item() for log, answer in each]
        found.append(max(range(count), key=sums.__getitem__) == number)
    return found


def fact_table(
    model: PreTrainedModel, texts: Sequence[tuple[int, FactText]], methods: Sequence[Method]
) -> pd.DataFrame:
    """A row a fact and method (`COLUMNS`), of texts with their nominal lengths."""
    rows = []
    for method in methods:
        for number, (length, text) in enumerate(tqdm(texts, method.name, leave=False)):
            found = found_facts(model, text, method, number)
            rows += [
                (method.name, length, number, depth, int(each)) for depth, each in zip(text.depths, found, strict=True)
            ]
    return pd.DataFrame(rows, columns=COLUMNS)


def fact_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Share of the facts that each method finds, by length, with a 95% interval from drawing whole texts."""
    rows = []
    for (length, method), part in table.groupby(["length", "method"], sort=False):
        found = part.found.to_numpy()
        value, low, high = bootstrap_groups(lambda at, found=found: found[at].mean(), part.number.to_numpy())
        rows.append((method, length, part.number.nunique(), len(part), value, low, high))
    return pd.DataFrame(rows, columns=["method", "length", "texts", "facts", "found", "found_low", "found_high"])
