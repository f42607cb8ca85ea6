"""`PackedTokens`: a run of slots, each holding one token as stored, key and value, for each layer, row and head."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from helpers.cache.codec import Codes

EMPTY = 255  # `token` of a slot that holds none; blocks are therefore at most 254 tokens long
SLOT_DIM = 3


@dataclass
class PackedTokens:
    """Slots `[L, B, H, n, ...]` of L layers, B rows and H heads; one layer's `[B, H, n, ...]` in `Bucket.held`.

    The position of a slot's token in the text is `block_start + token`. Heads settle tokens each for itself, so that
    one slot may hold another token in every head; only where its block starts is the same in all of them.
    """

    key: Codes
    value: Codes
    token: torch.Tensor  # uint8 [L, B, H, n], place of the token in its block, or `EMPTY`
    block_start: torch.Tensor  # int32 [1, B, 1, n], position of the block's first token
    received: torch.Tensor | None = None  # float16 [L, B, H, n], attention received from later blocks, if recorded

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "PackedTokens":
        """The same slots with every tensor changed alike."""
        received = None if self.received is None else change(self.received)
        return PackedTokens(
            self.key.map(change), self.value.map(change), change(self.token), change(self.block_start), received
        )

    def named(self) -> dict[str, torch.Tensor]:
        """Every tensor there is, by the name under which attention's kernels know it."""
        every = {
            "key_codes": self.key.codes,
            "key_scales": self.key.scales,
            "value_codes": self.value.codes,
            "value_scales": self.value.scales,
            "token": self.token,
            "block_start": self.block_start,
            "received": self.received,
        }
        return {name: tensor for name, tensor in every.items() if tensor is not None}

    def positions(self) -> torch.Tensor:
        """Position of each slot's token, int64 `[(L,) B, H, n]`; meaningless where `token` is `EMPTY`."""
        return self.block_start + self.token.long()

    def take(self, index: torch.Tensor) -> "PackedTokens":
        """The slots `index` `[L, B, H, k]`, which each layer, row and head chooses for itself."""
        return self.map(lambda x: take(x, index))


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Slots `index` `[L or 1, B, H or 1, k]` of `x` `[L or 1, B, H or 1, n, ...]`."""
    # A tensor without layers or heads is only ever asked for slots on which they agree, so the first will do.
    index = index[: x.shape[0], :, : x.shape[2]]
    at = index.reshape(*index.shape, *[1] * (x.ndim - 4))
    return x.gather(SLOT_DIM, at.expand(*x.shape[:SLOT_DIM], index.shape[-1], *x.shape[4:]))
