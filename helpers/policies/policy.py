"""What a policy is: from the features of tokens to the widths at which they are stored.

A policy decides at *commit*, when a token leaves the full-precision tail of the cache, and may decide again a few
blocks later, when its block *settles* at its final width and it is known how much attention each token received. It
knows nothing of the cache. Random controls are policies like all others, so that every comparison can include them.
"""

from abc import ABC, abstractmethod

import torch

from helpers.cache import Demotion, Plan, Widths
from helpers.policies.features import TokenFeatures
from helpers.policies.rarity import TokenCounts


class Policy(ABC):
    """What the driver needs of a policy; `widths` is what every policy defines."""

    name: str = "policy"  # short, for tables and figures
    needs: tuple[str, ...] = ()  # features of `TokenFeatures` that it reads at commit
    needs_received: bool = False  # whether its scores read received attention
    plan: Plan | None = None  # where neither logits nor chance decide: what the cache then does by itself
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
