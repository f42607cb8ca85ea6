"""A conversation on one cache: what each turn costs, and how far predictions stray.

Full precision writes the conversation once, greedily. Then each method reads it as it would have come: of each turn
first what is new, the end of the last answer and the next question, in one forward, then the answer token by token.
The questions are the project's own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.cache import stored_bytes
from helpers.evaluation.methods import FullPrecision, Method
from helpers.evaluation.metrics import kl_divergence
from helpers.policies import CachedModel
from helpers.policies.decoding import timed

QUESTIONS = (
    "Name three animals that live in a river.",
    "Which of them is the largest?",
    "What does it eat?",
    "Where could I see one?",
    "What should I take with me on such a journey?",
    "How do I pack these things so that they stay dry?",
    "Give me a list of five kinds of food that keep for a week.",
    "Which of these needs no cooking?",
    "How much of it do two people need for three days?",
    "Thank you. Sum up in two sentences what we talked about.",
)


def next_turn(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], messages: list[dict[str, str]], question: str
) -> list[int]:
    """The tokens of a conversation with one more question, `ids` being what was read and written before.

    `messages` are the turns so far, as chat templates take them; only what the template adds is turned into tokens, so
    that what was read stays as it was.
    """
    asked = [*messages, {"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    if messages:
        said = tokenizer.apply_chat_template(messages, tokenize=False)
        end = said[said.rindex(messages[-1]["content"]) + len(messages[-1]["content"]) :]
        text = end + text[len(said) :]
        if ids[-1] == tokenizer.eos_token_id:  # the answer ended by itself
            text = text.removeprefix(tokenizer.eos_token)
    return ids + tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Turn:
    """What is new in a turn, in tokens: what comes before the answer, and the answer."""

    asked: list[int]
    answered: list[int]
    answer: str


@torch.no_grad()
def write_conversation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str] = QUESTIONS,
    answer_tokens: int = 40,
) -> list[Turn]:
    """A conversation in full precision, answers of at most `answer_tokens`, written greedily."""
    ids, messages, turns = [], [], []
    cached = CachedModel(model)
    for question in questions:
        text = next_turn(tokenizer, ids, messages, question)
        inputs = torch.tensor([text], device=model.device)
        written = model.generate(
            inputs, attention_mask=torch.ones_like(inputs), cache=cached.cache, do_sample=False,
            max_new_tokens=answer_tokens, pad_token_id=tokenizer.pad_token_id,
        )[0].tolist()  # fmt: skip
        answer = tokenizer.decode(written[len(text) :], skip_special_tokens=True)
        turns.append(Turn(text[len(ids) :], written[len(text) :], answer))
        messages = [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids = written
    return turns


def read_conversation(
    model: PreTrainedModel,
    method: Method,
    turns: Sequence[Turn],
    references: Sequence[torch.Tensor] | None = None,
    keep: bool = True,
) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
    """A row a turn, and its predictions `[1, answer tokens, vocabulary]`.

    Columns: `turn`, `read` (tokens that were read for it), `tokens` so far, `seconds`, `held_bytes`, and `kl`, the mean
    over the answer's tokens to the predictions `references` of full precision. Without `keep` every turn reads the
    whole conversation into a cache of its own.
    """
    cached, before, last, rows, predictions = method.open(model), [], [], [], []
    for number, turn in enumerate(turns):
        new = [*last, *turn.asked]
        if not keep:
            cached, new = method.open(model), [*before, *turn.asked]
        parts, seconds = [], 0.0
        for tokens in (new, *([token] for token in turn.answered[:-1])):
            ids = torch.tensor([tokens], device=model.device)
            logits, ms = timed(model.device, cached.read, ids, 1)
            parts.append(logits)
            seconds += ms / 1000
        predictions.append(torch.cat(parts, dim=1))
        before = [*before, *turn.asked, *turn.answered]
        last = turn.answered[-1:]
        row = {"turn": number + 1, "read": len(new), "tokens": len(before), "seconds": seconds}
        row |= {"held_bytes": stored_bytes(cached.cache)}
        if references is not None:
            row["kl"] = kl_divergence(references[number], predictions[-1]).mean().item()
        rows.append(row)
    return rows, predictions


def chat_table(model: PreTrainedModel, turns: Sequence[Turn], methods: Sequence[Method]) -> pd.DataFrame:
    """Rows of `read_conversation` for full precision, for it with every turn reading all, and for each method."""
    full, references = read_conversation(model, FullPrecision(), turns)
    again, _ = read_conversation(model, FullPrecision(), turns, references, keep=False)
    runs = {"full precision": [row | {"kl": 0.0} for row in full], "full precision, all read again": again}
    for method in methods:
        runs[method.name], _ = read_conversation(model, method, turns, references)
    return pd.DataFrame([{"method": name, **row} for name, rows in runs.items() for row in rows])
