"""Keys and values of a text in full precision, and as they come back from storage at any width."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from helpers.cache import PackedKVCache
from helpers.cache.centre import CENTRE_TOKENS
from helpers.cache.codec import Codec, Coding
from helpers.cache.order import places
from helpers.cache.quantization import Widths, width_pair


@dataclass
class TextStates:
    """Keys and values `[L, 1, H, T, D]` of one text in full precision, each with the codec that stores them."""

    sides: tuple[tuple[torch.Tensor, Codec], tuple[torch.Tensor, Codec]]  # of keys, of values
    coding: Coding

    @property
    def full(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in full precision."""
        return tuple(states for states, _ in self.sides)

    def stored(self, bits: Widths) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as they come back from storage at `bits`, or at (key bits, value bits); sinks at 16 bits."""
        start, sinks = self._start, self.coding.sinks
        result = []
        for (states, codec), width in zip(self.sides, width_pair(bits), strict=True):
            back = codec.decode(codec.encode(states, width, start), start).to(states.dtype)
            back[:, :, :, :sinks] = states[:, :, :, :sinks].to(codec.full_dtype)
            result.append(back)
        return tuple(result)

    def relative_errors(self, bits: int) -> list[torch.Tensor]:
        """Squared errors of keys and values stored at `bits` over their squared lengths, `[L, 1, H, T]` each.

        As a policy is told them: of sinks, too, what they would be.
        """
        return [codec.relative_error(states, bits, self._start) for states, codec in self.sides]

    @property
    def _start(self) -> torch.Tensor:
        """Where each token's block begins."""
        return places(self.sides[0][0], 0, self.coding.block)[1]


def text_states(cache: Cache, config: PreTrainedConfig) -> TextStates:
    """Keys and values that a full-precision forward left in `cache` (one row), with the codecs that a packed cache of
    this model has by default, centred on them.

    Raises `ValueError` for models whose layers differ in shape, and for texts too short to be centred.
    """
    keys, values = ([getattr(layer, name).detach()[:1] for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) > 1:
        raise ValueError("sensitivity needs a model whose layers have keys and values of one shape")
    if keys[0].shape[2] < CENTRE_TOKENS:
        raise ValueError(f"a text needs {CENTRE_TOKENS} tokens or more, got {keys[0].shape[2]}")
    keys, values = torch.stack(keys), torch.stack(values)
    coding = PackedKVCache(config).coding
    key_codec, value_codec = coding.codecs(keys, values, list(range(len(keys))))
    key_codec.centre.fix(keys)
    key_codec.centre.reserve(keys.shape[3])
    return TextStates(((keys, key_codec), (values, value_codec)), coding)
