"""Gated generation for several prompts at once: each text has its own gate decisions, the models read them together.

    results = gated_generate_batch(small, large, tokenizer, prompts, gate)

The small model reads the newest token of all texts in one forward; the large one reads, in one forward, all that it
has not seen of the texts where the gate fires now. What is written is what `gated_generate` writes on each prompt
(but for rounding, and for gates that steer themselves, which see the texts in turn here).
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.generation import check_number, gated_generate, judge, tokens_to_judge
from helpers.gate.hidden import noting_hidden
from helpers.gate.prompts import check_same_tokens, end_tokens, prompt_ids
from helpers.gate.rows import RowReader, reads_rows
from helpers.gate.signals import random_stream
from helpers.gate.text import LARGE, SMALL, Generated
from helpers.gate.writing import Sampler, TokenStream
from helpers.policies.decoding import synchronise


def gated_generate_batch(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    gate: EntropyGate,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    stop_at_end: bool = True,
) -> list[Generated]:
    """Go on from each of `prompts`, as `gated_generate` does from one; its parameters are explained there.

    `seconds` of a text is the time until it was done, counted from the beginning of the batch. Raises `ValueError` as
    `gated_generate` does, for no prompts, and for models with layers that a batch cannot serve.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a list of one or more texts, got {prompts!r}")
    large_tokenizer = large_tokenizer or tokenizer
    check_same_tokens(tokenizer, large_tokenizer)
    gate.signal.check_pair(small, large)
    writer = RowReader(small, SMALL, [prompt_ids(tokenizer, each) for each in prompts], max_new_tokens)
    expert = RowReader(large, LARGE, [prompt_ids(large_tokenizer, each) for each in prompts], max_new_tokens)
    ends = end_tokens(small, large) if stop_at_end else set()
    draws = [random_stream(gate.seed, prompt) for prompt in writer.prompts]
    choosers = [Sampler(temperature, seed) for _ in prompts]
    results = [Generated() for _ in prompts]

    synchronise(small.device)
    streams = [TokenStream(None, prompt) for prompt in writer.prompts]
    with torch.inference_mode(), noting_hidden(small, gate.signal.needs_hidden) as hidden:
        active = list(range(len(prompts)))
        while active:
            logits = writer.catch_up(active, [results[row].token_ids for row in active])[:, 0]
            verdicts = _ask_large(expert, active, gate, results) if gate.signal.needs_large else {}
            chosen_from, fired = dict(zip(active, logits, strict=True)), []
            for at, row in enumerate(active):
                result, verdict = results[row], verdicts.get(row)
                known = (hidden.states[at, -1], writer.prompts[row] + result.token_ids) if hidden.wanted else ()
                value = gate.signal.value(logits[at], None if verdict is None else verdict[-1], draws[row], *known)
                check_number(value, len(result.token_ids))
                result.signal.append(value)
                if gate.fires(value):
                    fired.append(row)
            if fired and not gate.signal.needs_large:
                verdicts = _ask_large(expert, fired, gate, results)
            for row in fired:
                taken_back = judge(verdicts[row], gate.rollback, results[row], [])
                writer.take_back(row, taken_back)
                expert.take_back(row, taken_back)
                chosen_from[row] = verdicts[row][-1 - taken_back]
            for row, distribution in chosen_from.items():
                result = results[row]
                result.token_ids.append(choosers[row](distribution))
                result.authors.append(LARGE if row in fired else SMALL)
                streams[row].show(result.token_ids)
                result.seconds, result.first_token_seconds = streams[row].seconds, streams[row].first_seconds
            active = [
                row
                for row in active
                if len(results[row].token_ids) < max_new_tokens and results[row].token_ids[-1] not in ends
            ]
    for result in results:
        result.text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return results


def gated_texts(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    gate: EntropyGate,
    max_new_tokens: int = 50,
    batch: int = 32,
    **settings,
) -> list[Generated]:
    """What the gate writes on each of `prompts`, up to `batch` of like length at once where that can be.

    One after the other where `settings` of `gated_generate` name a cache or a streamer, where the gate steers itself,
    and for models with layers that a batch cannot serve.
    """
    alone = batch == 1 or isinstance(gate, OnlineTracker)
    alone = alone or settings.keys() & {"small_cache", "large_cache", "streamer"}
    if alone or not (reads_rows(small) and reads_rows(large)):
        return [gated_generate(small, large, tokenizer, each, gate, max_new_tokens, **settings) for each in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, Generated] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        chosen = [prompts[i] for i in rows]
        written = gated_generate_batch(small, large, tokenizer, chosen, gate, max_new_tokens, **settings)
        results |= dict(zip(rows, written, strict=True))
    return [results[i] for i in range(len(prompts))]


def _ask_large(
    expert: RowReader, rows: list[int], gate: EntropyGate, results: list[Generated]
) -> dict[int, torch.Tensor]:
    """What the large model predicts on each of `rows`, `[n, vocabulary]`: after the tokens that it judges, and last."""
    texts = [results[row].token_ids for row in rows]
    keep = [
        1 + tokens_to_judge(expert.unread(row, text), text, gate.rollback)
        for row, text in zip(rows, texts, strict=True)
    ]
    logits = expert.catch_up(rows, texts, max(keep))
    return {row: of_row[-n:] for row, of_row, n in zip(rows, logits, keep, strict=True)}
