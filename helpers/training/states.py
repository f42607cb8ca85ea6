"""Keys and values of a text in full precision, and as they come back from storage at any width."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from helpers.cache.codec import CENTRE_TOKENS, Codec, make_codecs
from helpers.cache.quantization import Widths, width_pair


@dataclass
class TextStates:
    """Keys and values `[L, 1, H, T, D]` of one text in full precision, each with the codec that stores them."""

    sides: tuple[tuple[torch.Tensor, Codec], tuple[torch.Tensor, Codec]]  # of keys, of values

    @property
    def full(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in full precision."""
        return tuple(states for states, _ in self.sides)

    def stored(self, bits: Widths) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they come back from storage at `bits`, or at (key bits, value bits)."""
        pairs = zip(self.sides, width_pair(bits))
        return tuple(codec.decode(codec.encode(states, width)).to(states.dtype) for (states, codec), width in pairs)

    def relative_errors(self, bits: int) -> list[torch.Tensor]:
        """Squared errors of keys and values stored at `bits` over their squared lengths, `[L, 1, H, T]` each."""
        return [codec.relative_error(states, bits) for states, codec in self.sides]


def text_states(cache: Cache) -> TextStates:
    """Keys and values that a full-precision forward left in `cache` (one row), with codecs centred on them.

    Raises `ValueError` for models whose layers differ in shape, and for texts too short to be centred.
    """
    keys, values = ([getattr(layer, name).detach()[:1] for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) > 1:
        raise ValueError("sensitivity needs a model whose layers have keys and values of one shape")
    if keys[0].shape[2] < CENTRE_TOKENS:
        raise ValueError(f"a text needs {CENTRE_TOKENS} tokens or more, got {keys[0].shape[2]}")
    keys, values = torch.stack(keys), torch.stack(values)
    key_codec, value_codec = make_codecs(keys, values, "rotated")
    key_codec.set_centre(keys, None, slice(None), len(keys))
    return TextStates(((keys, key_codec), (values, value_codec)))
