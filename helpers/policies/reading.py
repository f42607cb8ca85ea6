"""Reading texts block by block."""

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from helpers.cache.memory_errors import explain_out_of_memory
from helpers.models.tokens import check_not_empty
from helpers.policies.driver import PolicyDriver


def score_blocks(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, driver: PolicyDriver | None = None, block: int = 16
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Feed texts `[B, tokens]` block by block; yield the positions of each block and its logits `[B, n, vocabulary]`.

    Each block is one forward over what the cache made of the blocks before. It is committed when the caller asks for
    the next one, so that a caller who looks at the cache sees it as the block's last token did. `block` should be
    the cache's own, or tokens would be seen in full precision that decoding sees quantized.
    """
    check_not_empty(input_ids)
    for start in range(0, input_ids.shape[1], block):
        ids = input_ids[:, start : start + block]
        with torch.no_grad(), explain_out_of_memory(f"reading tokens from {start} on", (model, cache)):
            logits = model(input_ids=ids, cache=cache).logits
        yield slice(start, start + ids.shape[1]), logits
        if driver is not None:
            driver.observe(ids, logits)
