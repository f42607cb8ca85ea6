"""Keys and values of a text in full precision, and as they come back from storage."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from helpers.cache.store import CENTRE_TOKENS, PackedStore


@dataclass
class TextStates:
    """Keys and values `[L, 1, H, T, D]` of one text in full precision, and the store that codes them."""

    keys: torch.Tensor
    values: torch.Tensor
    store: PackedStore

    def stored(self, side: str, bits: int) -> torch.Tensor:
        """Keys or values as they come back from storage at `bits`, `[L, 1, H, T, D]`."""
        states = self.keys if side == "key" else self.values
        return self.store.decode(self.store.encode(states, side, bits), side, bits, slice(None)).to(states.dtype)

    def change(self, side: str, bits: int) -> torch.Tensor:
        """What storing at `bits` changes, `[L, 1, H, T, D]`."""
        return self.stored(side, bits) - (self.keys if side == "key" else self.values)


def text_states(cache: Cache, quantizer: str = "rotated") -> TextStates:
    """Keys and values that a full-precision forward left in `cache` (one row), with a store centred on them.

    Raises `ValueError` for models whose layers differ in shape, and for texts too short to be centred.
    """
    keys, values = ([getattr(layer, name).detach()[:1] for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) > 1:
        raise ValueError("sensitivity needs a model whose layers have keys and values of one shape")
    if keys[0].shape[2] < CENTRE_TOKENS:
        raise ValueError(f"a text needs {CENTRE_TOKENS} tokens or more, got {keys[0].shape[2]}")
    keys, values = torch.stack(keys), torch.stack(values)
    store = PackedStore(list(range(len(keys))), keys[0], values[0], quantizer)
    if quantizer == "rotated":
        store.set_centre(keys[:, :, :, :CENTRE_TOKENS], torch.ones(1, CENTRE_TOKENS, device=keys.device))
    return TextStates(keys, values, store)
