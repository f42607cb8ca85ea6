"""Keys and values of a text in full precision, and as they come back from storage."""

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from helpers.cache.codec import CENTRE_TOKENS, Codec, make_codecs


@dataclass
class TextStates:
    """Keys and values `[L, 1, H, T, D]` of one text in full precision, and the codecs that store them."""

    keys: torch.Tensor
    values: torch.Tensor
    key_codec: Codec
    value_codec: Codec

    def _of(self, side: str) -> tuple[torch.Tensor, Codec]:
        return (self.keys, self.key_codec) if side == "key" else (self.values, self.value_codec)

    def stored(self, side: str, bits: int) -> torch.Tensor:
        """Keys or values as they come back from storage at `bits`, `[L, 1, H, T, D]`."""
        states, codec = self._of(side)
        return codec.decode(codec.encode(states, bits)).to(states.dtype)

    def change(self, side: str, bits: int) -> torch.Tensor:
        """What storing at `bits` changes, `[L, 1, H, T, D]`."""
        return self.stored(side, bits) - self._of(side)[0]

    def error(self, side: str, bits: int) -> torch.Tensor:
        """Squared error of storing at `bits` over squared length, `[L, 1, H, T]`."""
        states, codec = self._of(side)
        return codec.relative_error(states, bits)


def text_states(cache: Cache, quantizer: str = "rotated") -> TextStates:
    """Keys and values that a full-precision forward left in `cache` (one row), with codecs centred on them.

    Raises `ValueError` for models whose layers differ in shape, and for texts too short to be centred.
    """
    keys, values = ([getattr(layer, name).detach()[:1] for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) > 1:
        raise ValueError("sensitivity needs a model whose layers have keys and values of one shape")
    if keys[0].shape[2] < CENTRE_TOKENS:
        raise ValueError(f"a text needs {CENTRE_TOKENS} tokens or more, got {keys[0].shape[2]}")
    keys, values = torch.stack(keys), torch.stack(values)
    key_codec, value_codec = make_codecs(keys, values, quantizer)
    if quantizer == "rotated":
        key_codec.set_centre(keys)
    return TextStates(keys, values, key_codec, value_codec)
