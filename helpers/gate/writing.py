"""What every loop that writes a text shares: who reads it, the choice of the next token, the way to a streamer."""

import math
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.streamers import BaseStreamer

from helpers.models import check_context
from helpers.policies import CachedModel, PolicyDriver

CacheFactory = Callable[[PreTrainedModel], Cache | PolicyDriver]


class TextReader(CachedModel):
    """A model, its own version of the prompt (token ids) and its cache, empty at first.

    It may lag behind what is written, and catches up in one forward. Raises `ValueError` for a cache that is not
    empty, and where the prompt and what is to be written do not fit into the context of the model, which is called
    `name` then.
    """

    def __init__(
        self, model: PreTrainedModel, name: str, prompt: list[int], max_new_tokens: int, factory: CacheFactory | None
    ):
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        check_context(model, len(prompt), max_new_tokens, name)
        made = factory(model) if factory else None
        driver = made if isinstance(made, PolicyDriver) else None
        super().__init__(model, driver.cache if driver else made, driver)
        if self.length:
            raise ValueError(
                f"the cache of the {model.config.model_type} model must be empty, as every text starts anew"
            )
        self.prompt, self.device = prompt, model.device  # asking a model for its device takes longer than a tensor

    def unread(self, written: list[int]) -> int:
        """How many tokens of the prompt and `written` this model has not read."""
        return len(self.prompt) + len(written) - self.length

    def catch_up(self, written: list[int], keep: int = 1) -> torch.Tensor:
        """Read what is new of prompt and `written`; predictions after its last `keep` tokens, `[keep, vocabulary]`."""
        start = self.length - len(self.prompt)
        new = written[start:] if start >= 0 else self.prompt[start:] + written
        return self.read(torch.tensor([new], device=self.device), keep)[0]


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
