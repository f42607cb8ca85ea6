"""What every loop that writes a text shares: the choice of the next token, and the way of tokens to a streamer."""

import math
import time

import torch
from transformers.generation.streamers import BaseStreamer


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
    """Hands tokens to the streamer once they cannot be taken back; the seconds until the first, from its making on."""

    def __init__(self, streamer: BaseStreamer | None, prompt: list[int]):
        self.streamer, self.shown, self.started, self.first_seconds = streamer, 0, time.perf_counter(), 0.0
        if streamer is not None:
            streamer.put(torch.tensor([prompt]))

    def show(self, written: list[int]) -> None:
        if not self.shown and written:
            self.first_seconds = self.seconds
        if self.streamer is not None:
            for token in written[self.shown :]:
                self.streamer.put(torch.tensor([token]))
        self.shown = len(written)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()
