"""A generated text: who wrote which token, and its way to a streamer."""

import math
import time
from dataclasses import dataclass
from typing import Protocol

import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

SMALL, LARGE = "small", "large"


class Streamer(Protocol):
    """What `generate()` streams to as well, such as `transformers.TextStreamer`."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


@dataclass
class Generated:
    """A text and how it came about; the lists have one entry a token, in order.

    `signal` is what the gate saw when the token was decided (NaN without a gate). `seconds` is the whole
    time, the prompt included; `first_token_seconds` the time until the first token stood. `discarded` counts the
    tokens that `rollbacks` took back.
    """

    text: str
    token_ids: list[int]
    authors: list[str]  # "small" or "large"
    signal: list[float]
    seconds: float
    first_token_seconds: float
    large_calls: int = 0
    rollbacks: int = 0
    discarded: int = 0

    @property
    def usage(self) -> float:
        """Share of the tokens that the large model wrote."""
        return self.authors.count(LARGE) / len(self.authors) if self.authors else 0.0


class Sampler:
    """The next token of a distribution: the most probable, or drawn at `temperature` on the CPU from a seed."""

    def __init__(self, temperature: float, seed: int):
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        if not self.temperature:
            return int(logits.argmax(-1))
        p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(-1)
        return int(torch.multinomial(p.cpu(), 1, generator=self.generator))


class TokenStream:
    """Hands tokens to the streamer once they stand, and remembers when the first did."""

    def __init__(self, streamer: Streamer | None, prompt: list[int]):
        self.streamer, self.shown, self.first = streamer, 0, 0.0
        if streamer is not None:
            streamer.put(torch.tensor([prompt]))

    def show(self, written: list[int]) -> None:
        if not self.shown and written:
            self.first = time.perf_counter()
        if self.streamer is not None:
            for token in written[self.shown :]:
                self.streamer.put(torch.tensor([token]))
        self.shown = len(written)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def trace(result: Generated, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """One row a token of a gated text: `step`, `token_id`, `token` (text), `signal`, `fired` and `author`.

    A token that a rollback put in has the large model as author although the gate had not fired: `fired` is by
    author, `signal` what the small model said.
    """
    return pd.DataFrame(
        {
            "step": range(len(result.token_ids)),
            "token_id": result.token_ids,
            "token": [tokenizer.decode([token]) for token in result.token_ids],
            "signal": result.signal,
            "fired": [author == LARGE for author in result.authors],
            "author": result.authors,
        }
    )
