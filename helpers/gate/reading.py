"""A prompt and what is written after it, read by one model that may lag behind and catches up in one forward."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from helpers.models import check_context
from helpers.policies import CachedModel, PolicyDriver

CacheFactory = Callable[[PreTrainedModel], Cache | PolicyDriver]


class TextReader(CachedModel):
    """A model, its own version of the prompt (token ids) and its cache, empty at first.

    Raises `ValueError` for a cache that is not empty, and where the prompt and what is to be written do not fit into
    the context of the model, which is called `name` then.
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
