"""Keys and values of a text in full precision, and as they come back from storage at any width."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from helpers.cache.quantization import Widths, width_pair
from helpers.cache.store import CENTRE_TOKENS, PackedStore


@dataclass
class TextStates:
    """Keys and values `[L, 1, H, T, D]` of one text in full precision, and the store that codes them."""

    keys: torch.Tensor
    values: torch.Tensor
    store: PackedStore

    def stored(self, bits: Widths) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they come back from storage at `bits`, or at (key bits, value bits)."""
        key_bits, value_bits = width_pair(bits)
        return self._stored(self.keys, "key", key_bits), self._stored(self.values, "value", value_bits)

    def _stored(self, states: torch.Tensor, side: str, bits: int) -> torch.Tensor:
        return self.store.decode(self.store.encode(states, side, bits), side, bits, slice(None)).to(states.dtype)

    def relative_errors(self, bits: int) -> dict[str, torch.Tensor]:
        """`key_error` and `value_error` `[T]` of storage at `bits`, means over layers and heads."""
        sides = {"key": self.keys, "value": self.values}
        return {f"{s}_error": self.store.relative_error(x, s, bits).mean((0, 1, 2)) for s, x in sides.items()}


def text_states(cache: Cache) -> TextStates:
    """Keys and values that a full-precision forward left in `cache` (one row), with a store centred on them.

    Raises `ValueError` for models whose layers differ in shape, and for texts too short to be centred.
    """
    keys, values = ([getattr(layer, name).detach()[:1] for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) > 1:
        raise ValueError("sensitivity needs a model whose layers have keys and values of one shape")
    if keys[0].shape[2] < CENTRE_TOKENS:
        raise ValueError(f"a text needs {CENTRE_TOKENS} tokens or more, got {keys[0].shape[2]}")
    keys, values = torch.stack(keys), torch.stack(values)
    store = PackedStore(list(range(len(keys))), keys[0], values[0], "rotated")
    store.set_centre(keys[:, :, :, :CENTRE_TOKENS], torch.ones(1, CENTRE_TOKENS, device=keys.device))
    return TextStates(keys, values, store)
