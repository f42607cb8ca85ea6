"""One text through one model: its prompt, its cache, the choice of the next token, and what comes of it.

What all generation loops of the gate share; the loops are in `gate.py` and `gate_baselines.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from helpers.cache.memory_errors import explain_out_of_memory
from helpers.policies.driver import PolicyDriver

CacheFactory = Callable[[PreTrainedModel], Cache | PolicyDriver]


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
