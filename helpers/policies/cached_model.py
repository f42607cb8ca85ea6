"""`CachedModel`: a model and the cache that it reads through, under a policy or without one.

    cached = CachedModel(model, cache, driver)
    logits = cached.read(prompt)  # [B, tokens, vocabulary]
    logits = cached.read(next_token, keep=1)

Every measurement, the gate and a user's own loop read texts with it. Policies choose widths from what has been read:
`read` shows it to the driver, which commits what is complete.
"""

import copy
from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from helpers.cache import explain_out_of_memory
from helpers.models import check_not_empty
from helpers.policies.driver import PolicyDriver


class CachedModel:
    """A model, a cache (by default the library's `DynamicCache`) and the driver that commits to it, if any.

    Raises `ValueError` where the driver belongs to another cache.
    """

    def __init__(self, model: PreTrainedModel, cache: Cache | None = None, driver: PolicyDriver | None = None):
        self.model, self.driver = model, driver
        self.cache = DynamicCache(config=model.config) if cache is None else cache
        if driver is not None and driver.cache is not self.cache:
            raise ValueError("driver must belong to the cache: make it as PolicyDriver(model, cache, policy)")

    @property
    def length(self) -> int:
        """Tokens of each row that have been read."""
        return self.cache.get_seq_length()

    def read(self, input_ids: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        """Read the next tokens `[B, n]`, and commit; predictions after the last `keep` of them (default: all).

        Returns logits `[B, keep, vocabulary]`. Raises `ValueError` for no tokens.
        """
        every = self.driver is not None and bool(self.driver.wanted)  # its policy looks at all predictions
        logits = self.forward(input_ids, None if every else keep)
        self.observe(input_ids, logits)
        return logits[:, -keep:] if every and keep else logits

    def forward(self, input_ids: torch.Tensor, keep: int | None = None) -> torch.Tensor:
        """`read` without what follows it: whoever calls this calls `observe` before the next tokens."""
        check_not_empty(input_ids)
        what = f"reading {input_ids.shape[1]} token(s)"
        with torch.no_grad(), explain_out_of_memory(what, (self.model, self.cache)):
            return self.model(input_ids=input_ids, cache=self.cache, logits_to_keep=keep or 0).logits

    def observe(self, input_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Let the driver take note of tokens `[B, n]` just read and of their predictions, and commit."""
        if self.driver is not None:
            with explain_out_of_memory("storing keys and values", (self.model, self.cache)):
                self.driver.observe(input_ids, logits)

    def take_back(self, tokens: int, last_logits: torch.Tensor | None = None) -> None:
        """Forget the newest `tokens` tokens of each row.

        `last_logits` `[B, vocabulary]`, the prediction after the last token that stays, is needed by policies that
        read surprisal. Raises `ValueError` where more is to be taken back than was read.
        """
        if self.driver is not None:
            self.driver.crop(tokens, last_logits)
        elif not 0 <= tokens <= self.length:
            raise ValueError(f"tokens must lie between 0 and {self.length}, which are read, got {tokens}")
        else:
            self.cache.crop(-tokens)

    def __deepcopy__(self, memo: dict) -> "CachedModel":
        """One that goes on by itself from what was read, with the same model: texts that begin alike share it."""
        memo[id(self.model)] = self.model
        return CachedModel(self.model, copy.deepcopy(self.cache, memo), copy.deepcopy(self.driver, memo))

    def reset(self) -> None:
        """Forget the text; the next one starts anew."""
        self.cache.reset()
        if self.driver is not None:
            self.driver.reset()


def score_blocks(cached: CachedModel, input_ids: torch.Tensor, block: int = 16) -> Iterator[tuple[slice, torch.Tensor]]:
    """Read texts `[B, tokens]` block by block; yield the positions of each block and its logits `[B, n, vocabulary]`.

    Each block is one forward over what the cache made of the blocks before. It is committed when the caller asks for
    the next one, so that a caller who looks at the cache sees it as the block's last token did. `block` should be
    the cache's own, or tokens would be seen in full precision that decoding sees quantized.
    """
    check_not_empty(input_ids)
    for start in range(0, input_ids.shape[1], block):
        ids = input_ids[:, start : start + block]
        logits = cached.forward(ids)
        yield slice(start, start + ids.shape[1]), logits
        cached.observe(ids, logits)
