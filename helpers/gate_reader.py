"""One text through one model: its prompt, its cache, the choice of the next token, and what comes of it.

What all generation loops of the gate share; the loops are in `gate.py` and `gate_baselines.py`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from helpers.generation import PolicyDriver
from helpers.memory import explain_out_of_memory
from helpers.models import encode

SMALL, LARGE = "small", "large"

CacheFactory = Callable[[PreTrainedModel], Cache | PolicyDriver]


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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model of this tokenizer expects it: in its chat template if it has one.

    Raises `ValueError` for a prompt of white space.
    """
    if not tokenizer.chat_template:
        return encode(tokenizer, prompt)
    if not prompt.strip():
        raise ValueError("prompt is empty: there is nothing to go on from")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_same_tokens(small: PreTrainedTokenizerBase, large: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` that says what differs unless both tokenizers give the same ids the same meaning."""
    if small is large:
        return
    ours, theirs = small.get_vocab(), large.get_vocab()
    differ = next((token for token, at in ours.items() if theirs.get(token, at) != at), None)
    only = next(iter(ours.keys() ^ theirs.keys()), None)
    reason = None
    if len(ours) != len(theirs):
        reason = f"the small model's has {len(ours)} tokens and the large one's {len(theirs)}"
    elif only is not None:
        reason = f"token {only!r} is only in the {'small' if only in ours else 'large'} model's"
    elif differ is not None:
        reason = (
            f"token {differ!r} is number {ours[differ]} in the small model's and {theirs[differ]} in the large one's"
        )
    elif small.eos_token_id != large.eos_token_id:
        reason = f"texts end with {small.eos_token!r} in the small model's and {large.eos_token!r} in the large one's"
    if reason:
        raise ValueError(f"the two models must share one tokenizer, since they read each other's tokens: {reason}")


def check_context(model: PreTrainedModel, name: str, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `ValueError` where the prompt and what is to be written do not fit into the model's context."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"prompt: {prompt_tokens} tokens and max_new_tokens={max_new_tokens} do not fit into the context of the "
            f"{name} model ({limit} tokens)"
        )


def end_tokens(*models: PreTrainedModel) -> set[int]:
    """Token ids that end a text for any of the models."""
    ends: set[int] = set()
    for model in models:
        ids = model.generation_config.eos_token_id
        ends |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return ends


@dataclass
class Reader:
    """A model, its cache and how far it has read: `read` catches up with a text."""

    model: PreTrainedModel
    prompt: list[int]
    cache: Cache | None
    driver: PolicyDriver | None = None
    seen: int = 0

    def __post_init__(self):
        self.device = self.model.device  # found anew at every asking, which takes longer than a tensor

    @classmethod
    def start(cls, model: PreTrainedModel, prompt: list[int], factory: CacheFactory | None) -> "Reader":
        made = factory(model) if factory else DynamicCache(config=model.config)
        driver = made if isinstance(made, PolicyDriver) else None
        cache = driver.cache if driver else made
        if cache.get_seq_length():
            raise ValueError(
                f"the cache of the {model.config.model_type} model must be empty, as every text starts anew"
            )
        return cls(model, prompt, cache, driver)

    def read(self, written: list[int], keep: int = 1) -> torch.Tensor:
        """Read what is new of prompt and `written`; the last `keep` predictions, `[keep, vocabulary]`."""
        start = len(self.prompt)
        new = written[self.seen - start :] if self.seen >= start else self.prompt[self.seen :] + written
        ids = torch.tensor([new], device=self.device)
        every = self.driver is not None and bool(self.driver.wanted)
        with explain_out_of_memory(f"reading {len(new)} token(s) of a gated text", (self.model, self.cache)):
            logits = self.model(input_ids=ids, cache=self.cache, logits_to_keep=0 if every else keep).logits
            if self.driver is not None:
                self.driver.observe(ids, logits)
        self.seen += len(new)
        return logits[0, -keep:] if every else logits[0]

    def take_back(self, tokens: int, last_logits: torch.Tensor | None) -> None:
        if self.driver is not None:
            self.driver.crop(tokens, None if last_logits is None else last_logits[None])
        else:
            self.cache.crop(-tokens)
        self.seen -= tokens


class Chooser:
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


class Outlet:
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
