"""What the gate is measured against: one model alone, with and without a cache, and assisted generation."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from helpers.gate.prompts import end_tokens, prompt_ids
from helpers.gate.text import LARGE, Generated
from helpers.gate.writing import Sampler, TextReader, TokenStream
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
    ends: set[int] | None = None,
) -> Generated:
    """One model alone, in the same loop as `gated_generate`: the baselines, with a cache and (naive) without.

    `ends` are the token ids that end the text, by default the model's own; none where it is empty.
    """
    choose = Sampler(temperature, seed)
    reader = TextReader(model, author, prompt_ids(tokenizer, prompt), max_new_tokens, None)
    ends = end_tokens(model) if ends is None else ends
    written: list[int] = []
    synchronise(model.device)
    stream = TokenStream(None, reader.prompt)
    while len(written) < max_new_tokens and not (written and written[-1] in ends):
        if use_cache:
            logits = reader.catch_up(written)
        else:
            given = torch.tensor([reader.prompt + written], device=reader.device)
            logits = model(input_ids=given, use_cache=False, logits_to_keep=1).logits[0]
        written.append(choose(logits[0]))
        stream.show(written)
    return _ungated(tokenizer, written, author, stream.seconds, stream.first_seconds)


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
    given, times = torch.tensor([ids], device=large.device), []
    clock = SimpleNamespace(put=lambda tokens: times.append(time.perf_counter()), end=lambda: None)
    least = {} if stop_at_end else {"min_new_tokens": max_new_tokens}
    synchronise(large.device)
    started = time.perf_counter()
    with _only_errors():  # the library warns of how it calls the assistant itself
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
    first = times[1] - started if len(times) > 1 else seconds  # the first of all is the prompt's
    return _ungated(tokenizer, written, LARGE, seconds, first)


@contextmanager
def _only_errors() -> Iterator[None]:
    """While open, transformers tells of errors only."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _ungated(
    tokenizer: PreTrainedTokenizerBase, written: list[int], author: str, seconds: float, first: float
) -> Generated:
    """A text that one author wrote without a gate."""
    text, n = tokenizer.decode(written, skip_special_tokens=True), len(written)
    return Generated(text, written, [author] * n, [math.nan] * n, seconds, first)
