"""What a policy is: from the features of tokens to the widths at which they are stored.

A policy decides at *commit*, when a token leaves the full-precision tail of the cache, and may decide again a few
blocks later, when its block *settles* at its final width and it is known how much attention each token received. It
knows nothing of the cache. Random controls are policies like all others, so that every comparison can include them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from helpers.cache import Demotion
from helpers.cache.quantization import Widths, check_width
from helpers.policies.features import TokenFeatures
from helpers.policies.rarity import TokenCounts


@dataclass(frozen=True)
class Step:
    """Once `after` blocks came later, a block moves to `bits` (keys, values); each head leaves its best `keep` share.

    Only the last step of a schedule may keep tokens: it settles the block.
    """

    after: int
    bits: Widths
    keep: float = 0.0

    def __post_init__(self):
        for bits in self.bits if isinstance(self.bits, tuple) else (self.bits,):
            check_width(bits)
        if self.after < 1:
            raise ValueError(f"after must be a number of blocks, 1 or more, got {self.after}")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"keep must be a share between 0 and 1, got {self.keep}")


class Policy(ABC):
    """What the driver needs of a policy; `widths` is what every policy defines."""

    name: str = "policy"  # short, for tables and figures
    needs: tuple[str, ...] = ()  # features of `TokenFeatures` that it reads at commit
    needs_received: bool = False  # whether its scores read received attention
    steps: tuple[Step, ...] = ()  # what happens to a block after its commit
    start_counts: TokenCounts | None = None  # token counts from which its rarity goes on

    @abstractmethod
    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor | Widths:
        """Width of each token, integer `[batch, tokens]`, or one width (or key and value pair) for all."""

    def scores(self, demotion: Demotion) -> torch.Tensor:
        """Which tokens to keep when blocks settle, highest first: `[L, B, H, slots]`.

        Raises `RuntimeError` where a policy has no ranking.
        """
        raise RuntimeError(f"{self.name} keeps tokens but does not rank them")

    def for_text(self, text: int) -> "Policy":
        """The policy as it is at the beginning of text number `text`: random ones draw the same in every run."""
        return self
