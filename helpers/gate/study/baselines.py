"""What the gate is measured against: one model alone, assisted generation, and the gate without caches.

`reference_gated_generate` is for tests: what the gate must write, told as plainly as possible.
"""

import math
import time

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.gate import EntropyGate, draws
from helpers.gate.generation import standing
from helpers.gate.prompts import check_context, end_tokens, prompt_ids
from helpers.gate.reader import Reader
from helpers.gate.signals import regret, uncertainty
from helpers.gate.text import LARGE, SMALL, Generated, Sampler, Streamer, TokenStream
from helpers.policies.decoding import synchronise


@torch.inference_mode()
def plain_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
    author: str = LARGE,
    streamer: Streamer | None = None,
    stop_at_end: bool = True,
    ends: set[int] | None = None,
) -> Generated:
    """One model alone, in the same loop as `gated_generate`: the baselines, with a cache and (naive) without.

    `ends` are the token ids that end the text, by default the model's own.
    """
    choose, ids = Sampler(temperature, seed), prompt_ids(tokenizer, prompt)
    check_context(model, author, len(ids), max_new_tokens)
    ends = (end_tokens(model) if ends is None else ends) if stop_at_end else set()
    reader = Reader.start(model, ids, None)
    written: list[int] = []
    synchronise(model.device)
    started = time.perf_counter()
    outlet = TokenStream(streamer, ids)
    while len(written) < max_new_tokens and not (written and written[-1] in ends):
        logits = reader.read(written)[0] if use_cache else _read_all(model, ids + written)[-1]
        written.append(choose(logits))
        outlet.show(written)
    seconds = time.perf_counter() - started
    outlet.end()
    text = tokenizer.decode(written, skip_special_tokens=True)
    n = len(written)
    return Generated(text, written, [author] * n, [math.nan] * n, seconds, outlet.first - started)


def _read_all(model: PreTrainedModel, ids: list[int], keep: int = 1) -> torch.Tensor:
    """The last `keep` predictions after a whole text, read without a cache: `[keep, vocabulary]`."""
    given = torch.tensor([ids], device=model.device)
    return model(input_ids=given, use_cache=False, logits_to_keep=keep).logits[0]


class _Clock:
    """A streamer that notes when the first new token came."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())  # the first is the prompt

    def end(self) -> None: ...


@torch.no_grad()
def assisted_generate(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 50,
    stop_at_end: bool = True,
) -> Generated:
    """transformers' assisted generation (greedy): the small model drafts, the large one checks every token."""
    ids = prompt_ids(tokenizer, prompt)
    given, clock = torch.tensor([ids], device=large.device), _Clock()
    least = {} if stop_at_end else {"min_new_tokens": max_new_tokens}
    synchronise(large.device)
    started = time.perf_counter()
    output = large.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        assistant_model=small,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        streamer=clock,
        **least,
    )
    written = output[0, len(ids) :].tolist()
    seconds = time.perf_counter() - started
    text = tokenizer.decode(written, skip_special_tokens=True)
    n = len(written)
    first = clock.times[1] - started if len(clock.times) > 1 else seconds
    return Generated(text, written, [LARGE] * n, [float("nan")] * n, seconds, first)


@torch.inference_mode()
def reference_gated_generate(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    gate: EntropyGate,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Generated:
    """What `gated_generate` must write, without caches: both models read the whole text at every step."""
    choose = Sampler(temperature, seed)
    small_ids, large_ids = (prompt_ids(each, prompt) for each in (tokenizer, large_tokenizer or tokenizer))
    draw, ends = draws(gate, small_ids), end_tokens(small, large)
    result = Generated("", [], [], [], 0.0, 0.0)
    judged = 0  # tokens before this one have been read by the large model in full
    started = time.perf_counter()
    while len(result.token_ids) < max_new_tokens and not set(result.token_ids[-1:]) & ends:
        written = result.token_ids
        logits = _read_all(small, small_ids + written)[0]
        verdicts = _read_all(large, large_ids + written, len(written) + 1)
        if gate.signal == "oracle":
            value = regret(verdicts[-1], logits)
        else:
            value = draw() if gate.signal == "random" else float(uncertainty(logits, gate.signal))
        if gate.fires(value):
            stands = standing(verdicts[judged:], written, gate.rollback)
            result.rollbacks += stands < len(written)
            result.discarded += len(written) - stands
            result.token_ids = [*written[:stands], choose(verdicts[stands])]
            result.authors = [*result.authors[:stands], LARGE]
            result.signal = [*result.signal, value][: stands + 1]
            result.large_calls += 1
            judged = stands + 1
        else:
            result.token_ids = [*written, choose(logits)]
            result.authors.append(SMALL)
            result.signal.append(value)
        if len(result.token_ids) == 1:
            result.first_token_seconds = time.perf_counter() - started
    result.seconds = time.perf_counter() - started
    result.text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return result
