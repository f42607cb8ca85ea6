"""Entropy-gated generation: a small model writes, and where it is unsure a large model writes that token.

    gate = EntropyGate.calibrate(small, tokenizer, texts, percentile=80)
    result = gated_generate(small, large, tokenizer, "Once upon a time", gate)
    result.text, result.usage, result.authors

Both models keep caches. The large one is idle until the gate fires; then it *catches up*: it reads all tokens that it
has not seen in one forward, and writes the next one. With a *rollback* it judges them as well, and may take some back.
With *usage* p, the share of the tokens that it writes, and cost ratio c (small to large, per token) no gate can be
faster than `1 / (c + p)` times the large model. One text at a time; `batch` writes several.
"""

import math

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from helpers.gate.gate import EntropyGate
from helpers.gate.hidden import noting_hidden
from helpers.gate.prompts import check_same_tokens, end_tokens, prompt_ids
from helpers.gate.signals import random_stream
from helpers.gate.text import LARGE, SMALL, Generated
from helpers.gate.writing import CacheFactory, Sampler, TextReader, TokenStream
from helpers.policies.decoding import synchronise


def gated_generate(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    gate: EntropyGate,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    small_cache: CacheFactory | None = None,
    large_cache: CacheFactory | None = None,
    streamer: BaseStreamer | None = None,
    stop_at_end: bool = True,
) -> Generated:
    """Go on from `prompt`: the small model writes, the large one where the gate fires.

    Greedy, or sampled with a `temperature` and a `seed`. Each model gets the prompt in the chat template of its own
    tokenizer, where that has one; `tokenizer` is the small model's, and the large one's too unless `large_tokenizer`
    is given. Ends with the end-of-text token of either model, which is kept in `token_ids`, or after
    `max_new_tokens`; with `stop_at_end=False` only there. A cache factory takes the model and returns an empty cache
    or a `PolicyDriver` around one; the default is `DynamicCache`. The streamer gets the small model's prompt, then
    each token once it cannot be taken back any more.

    Raises `ValueError` for tokenizers that differ, an empty prompt, and one that does not fit into a context.
    """
    large_tokenizer = large_tokenizer or tokenizer
    check_same_tokens(tokenizer, large_tokenizer)
    gate.signal.check_pair(small, large)
    choose = Sampler(temperature, seed)
    writer = TextReader(small, SMALL, prompt_ids(tokenizer, prompt), max_new_tokens, small_cache)
    expert = TextReader(large, LARGE, prompt_ids(large_tokenizer, prompt), max_new_tokens, large_cache)
    ends = end_tokens(small, large) if stop_at_end else set()
    draw = random_stream(gate.seed, writer.prompt)
    keeps_predictions = gate.rollback is not None and writer.driver and "surprisal" in writer.driver.wanted
    predictions: list[torch.Tensor] = []  # of the small model, one a step, where a rollback may need them
    result = Generated()
    written, authors = result.token_ids, result.authors

    synchronise(small.device)
    stream = TokenStream(streamer, writer.prompt)
    # Faster than no_grad, but what a packed cache keeps for later texts must not be born in it.
    inference = torch.inference_mode(small_cache is None and large_cache is None)
    with inference, noting_hidden(small, gate.signal.needs_hidden) as hidden:
        while len(written) < max_new_tokens and not (written and written[-1] in ends):
            logits = writer.catch_up(written)[0]
            if keeps_predictions:
                predictions.append(logits)
            large_logits = expert.catch_up(written) if gate.signal.needs_large else None
            known = (hidden.states[0, -1], writer.prompt + written) if hidden.wanted else ()
            value = gate.signal.value(logits, None if large_logits is None else large_logits[0], draw, *known)
            check_number(value, len(written))
            fired = gate.fires(value)
            result.signal.append(value)
            if fired:
                logits = _ask_large(expert, large_logits, gate.rollback, writer, predictions, result)
            written.append(choose(logits))
            authors.append(LARGE if fired else SMALL)
            if fired or gate.rollback is None:
                stream.show(written)
    stream.show(written)
    result.seconds, result.first_token_seconds = stream.seconds, stream.first_seconds
    stream.end()
    result.text = tokenizer.decode(written, skip_special_tokens=True)
    return result


def _ask_large(
    expert: TextReader,
    large_logits: torch.Tensor | None,
    rollback: float | None,
    writer: TextReader,
    predictions: list[torch.Tensor],
    result: Generated,
) -> torch.Tensor:
    """What the large model (`expert`) predicts for the next token, `[vocabulary]`, after a rollback if one is due.

    `large_logits` `[1, vocabulary]` are its prediction where the signal has asked it already. A rollback shortens
    what `judge` does, and both models' texts.
    """
    written = result.token_ids
    if large_logits is None:
        large_logits = expert.catch_up(written, tokens_to_judge(expert.unread(written), written, rollback) + 1)
    if taken_back := judge(large_logits, rollback, result, predictions):
        writer.take_back(taken_back, predictions[-1][None] if predictions else None)
        expert.take_back(taken_back, large_logits[-1 - taken_back][None])
    return large_logits[-1 - taken_back]


def tokens_to_judge(unread: int, written: list[int], rollback: float | None) -> int:
    """How many of the tokens that the large model is about to read it judges: those written, with a rollback."""
    return 0 if rollback is None else min(unread - 1, len(written))


def judge(large_logits: torch.Tensor, rollback: float | None, result: Generated, predictions: list) -> int:
    """Count a call of the large model, and take back what is too surprising to it: how many tokens, 0 mostly.

    `large_logits` `[n, vocabulary]` judge the last n - 1 tokens written. Shortens the lists of `result`, and the
    `predictions` of the small model, one a step, if they are kept.
    """
    result.large_calls += 1
    written = result.token_ids
    kept = standing(large_logits, written, rollback)
    taken_back = len(written) - kept
    if taken_back:
        result.rollbacks += 1
        result.discarded += taken_back
        for of_written in (written, result.authors):
            del of_written[kept:]
        for of_steps in (result.signal, predictions):  # the step that asked is among them
            del of_steps[kept + 1 :]
    return taken_back


def standing(large_logits: torch.Tensor, written: list[int], rollback: float | None) -> int:
    """How many of the tokens stand when the large model's predictions `[n, vocabulary]` judge the last n - 1."""
    judged = large_logits.shape[0] - 1
    if rollback is None or not judged:
        return len(written)
    log_p = large_logits[:-1].to(torch.promote_types(large_logits.dtype, torch.float32)).log_softmax(-1)
    tokens = torch.tensor(written[-judged:], device=large_logits.device)
    bits = log_p.gather(-1, tokens[:, None])[:, 0] / -math.log(2)
    too_surprising = (bits > rollback).tolist()
    return len(written) - judged + (too_surprising.index(True) if True in too_surprising else judged)


def check_number(value: float, written: int) -> None:
    """Raise `ValueError` where the signal of the token after `written` ones is NaN: its logits were no numbers."""
    if math.isnan(value):
        raise ValueError(
            f"logits hold NaN or infinity after {written} written token(s), so that there is no entropy to gate by: "
            "run the models in float32 or bfloat16, or look for the first layer whose output is not finite"
        )
