"""KIVI's scheme (arXiv 2402.02750) as a cache of its own: what this project's cache is compared with.

Keys are quantized channel by channel over groups of tokens, values token by token over groups of channels; the newest
tokens stay in full precision. Written from the paper, in plain PyTorch: for quality and bytes, not for speed.
"""

from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from helpers.cache import dequantize, quantize

GROUP = 32  # numbers that share a scale and a zero


@dataclass
class _Side:
    """Keys or values of one layer `[B, H, tokens, D]`: quantized ones, then the newest in full precision."""

    bits: int
    per_channel: bool
    newest: torch.Tensor
    codes: list[torch.Tensor] = field(default_factory=list)  # uint8, of one portion each
    scales: list[torch.Tensor] = field(default_factory=list)  # float16 [..., 2]

    def read(self) -> torch.Tensor:
        """All tokens, in full precision."""
        parts = [self._ungrouped(*pair) for pair in zip(self.codes, self.scales, strict=True)]
        return torch.cat([*(part.to(self.newest.dtype) for part in parts), self.newest], dim=2)

    def quantize_oldest(self, tokens: int) -> None:
        """Quantize the oldest `tokens` tokens of those in full precision."""
        if tokens:
            codes, scales = quantize(
                self._grouped(self.newest[:, :, :tokens].float()), self.bits, search=False, stretch=False
            )
            self.codes.append(codes)
            self.scales.append(scales)
            self.newest = self.newest[:, :, tokens:].clone()

    def _grouped(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, GROUP)).mT if self.per_channel else x.unflatten(3, (-1, GROUP))

    def _ungrouped(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        x = dequantize(codes, scales, self.bits, torch.float32)
        return x.mT.flatten(2, 3) if self.per_channel else x.flatten(3, 4)


class KiviLayer(CacheLayerMixin):
    """One layer; tokens that leave the newest are quantized after the attention that they come with has seen them."""

    is_croppable = False
    is_sliding = False

    def __init__(self, bits: int, residual: int):
        super().__init__()
        self.bits, self.residual, self.length = bits, residual, 0
        self.sides: tuple[_Side, ...] = ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        states = zip((key_states, value_states), (True, False), strict=True)
        self.sides = tuple(_Side(self.bits, channels, x[:, :, :0]) for x, channels in states)
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `[B, H, n, D]`; returns all keys and values `[B, H, tokens, D]`."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for side, states in zip(self.sides, (key_states, value_states), strict=True):
            side.newest = torch.cat([side.newest, states], dim=2)
        self.length += key_states.shape[2]
        result = tuple(side.read() for side in self.sides)
        keys, values = self.sides
        keys.quantize_oldest(keys.newest.shape[2] // self.residual * self.residual)
        values.quantize_oldest(max(0, values.newest.shape[2] - self.residual))
        return result

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is held."""
        return [x for side in self.sides for x in (*side.codes, *side.scales, side.newest)]


class KiviCache(Cache):
    """Keys and values of `config`'s model at `bits`, the newest `residual` tokens (a multiple of 32) in full precision.

    Raises `ValueError` for head dimensions and residuals that are no multiples of 32.
    """

    def __init__(self, config: PreTrainedConfig, head_dim: int, bits: int = 4, residual: int = 128):
        if residual < GROUP or residual % GROUP:
            raise ValueError(f"residual must be a multiple of {GROUP}, got {residual}")
        if head_dim % GROUP:
            raise ValueError(f"head_dim must be a multiple of {GROUP} for KIVI's groups, got {head_dim}")
        super().__init__(layers=[KiviLayer(bits, residual) for _ in range(config.num_hidden_layers)])
