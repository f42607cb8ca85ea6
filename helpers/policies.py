"""Policies: from the features of tokens to the widths at which they are stored.

A policy decides at *commit*, when a token leaves the full-precision tail, and may decide again a few blocks later,
when its pending blocks *settle* and it is known how much attention each token received. It sees features and gives
widths and scores; it knows nothing of the cache. The random controls are members of the same family as the rules, so
that every comparison can include them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from helpers.features import TokenCounts, TokenFeatures
from helpers.packed_store import Demotion
from helpers.quantization import WIDTHS, check_width

Widths = int | tuple[int, int]


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
    needs_settled: tuple[str, ...] = ()  # features of `TokenFeatures` that it reads when a block settles
    needs_received: bool = False  # whether its scores read received attention
    steps: tuple[Step, ...] = ()  # what happens to a block after its commit
    start_counts: TokenCounts | None = None  # token counts from which its rarity goes on

    @abstractmethod
    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor | Widths:
        """Width of each token, integer `[batch, tokens]`, or one width (or key and value pair) for all."""

    def scores(self, demotion: Demotion, features: TokenFeatures) -> torch.Tensor:
        """Which tokens to keep when blocks settle, highest first: `[L, B, H, slots]`.

        `features` are those of the slots' tokens, `[B, slots]`. Raises `RuntimeError` where a policy has no ranking.
        """
        raise RuntimeError(f"{self.name} keeps tokens but does not rank them")


@dataclass(frozen=True)
class FixedBits(Policy):
    """Every token at the same width."""

    bits: int

    def __post_init__(self):
        check_width(self.bits)

    @property
    def name(self) -> str:
        return f"static {self.bits}-bit"

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> int:
        return self.bits


@dataclass(frozen=True)
class EntropyRule(Policy):
    """The rule-based dynamic policy: the less certain the model, the wider the token.

    Entropy (nats) below the first threshold gives 2 bits, then 4, 8 and, from the last threshold on, 16.
    """

    thresholds: tuple[float, float, float] = (2.0, 4.0, 6.0)
    needs: tuple[str, ...] = ("entropy",)
    name: str = "rule-based dynamic"

    def __post_init__(self):
        if len(self.thresholds) != 3 or not all(
            a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)
        ):
            raise ValueError(f"thresholds must be three rising entropies in nats, got {self.thresholds}")

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor:
        entropy = features.entropy
        edges = torch.tensor(self.thresholds, dtype=entropy.dtype, device=entropy.device)
        return torch.tensor(WIDTHS, device=entropy.device)[torch.bucketize(entropy.contiguous(), edges, right=True)]


@dataclass
class RandomBits(Policy):
    """Control: widths drawn at random with given shares of 2, 4, 8 and 16 bits, blind to the token."""

    shares: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    seed: int = 0
    text: int = 0
    name: str = "random"
    _draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self):
        if len(self.shares) != 4 or min(self.shares) < 0 or not abs(sum(self.shares) - 1) <= 1e-6:
            raise ValueError(f"shares must be four non-negative numbers that sum to 1, got {self.shares}")

    def for_text(self, text: int) -> "RandomBits":
        """A copy whose draws belong to text number `text`, whatever was drawn before."""
        return replace(self, text=text)

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor:
        generator = np.random.default_rng((self.seed, self.text, self._draws))
        self._draws += 1
        return torch.from_numpy(
            generator.choice(WIDTHS, size=(batch, tokens), p=np.divide(self.shares, sum(self.shares)))
        )


RANKINGS = ("random", "attention", "attention x error")


@dataclass(frozen=True)
class AgeSchedule(Policy):
    """Blocks are committed at one width and demoted with age; the last step may let each head keep its best tokens.

    `ranking` says which are best: "random" (the control), "attention" (received from later blocks so far) or
    "attention x error" (times the squared change that the demotion makes to the token's key and value). Reads no
    logits, so that it works in plain `generate()` and under beams.
    """

    commit: Widths
    steps: tuple[Step, ...]
    ranking: str = "attention x error"
    seed: int = 0
    text: int = 0

    def __post_init__(self):
        check_steps(self.steps)
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking must be one of {RANKINGS}, got {self.ranking!r}")

    @property
    def name(self) -> str:
        kept = f", {describe_kept(self.steps)} by {self.ranking}" if self.steps[-1].keep else ""
        return describe_schedule(self.commit, self.steps) + kept

    @property
    def needs_received(self) -> bool:
        return self.steps[-1].keep > 0 and self.ranking != "random"

    def for_text(self, text: int) -> "AgeSchedule":
        """A copy whose random ranking belongs to text number `text`."""
        return replace(self, text=text)

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> Widths:
        return self.commit

    def scores(self, demotion: Demotion, features: TokenFeatures) -> torch.Tensor:
        if self.ranking == "random":
            shape = demotion.key_error.shape
            generator = np.random.default_rng((self.seed, self.text, demotion.start))
            return torch.from_numpy(generator.random(shape)).to(demotion.key_error.device)
        if self.ranking == "attention":
            return demotion.received
        return demotion.received * (demotion.key_error + demotion.value_error)


def check_steps(steps: tuple[Step, ...]) -> None:
    """Raise `ValueError` unless ages rise and only the last step keeps tokens."""
    if not steps:
        raise ValueError("a schedule needs one step or more; use FixedBits for none")
    ages = [step.after for step in steps]
    if ages != sorted(set(ages)):
        raise ValueError(f"the steps of a schedule must come at rising ages, got {ages}")
    if any(step.keep for step in steps[:-1]):
        raise ValueError("only the last step of a schedule may keep tokens")


def describe_schedule(commit: Widths, steps: tuple[Step, ...]) -> str:
    """`8-4-2 @3,6`: widths in order and the ages in blocks; `K8-4-2 V4-2-2 @3,6` where keys and values differ.

    >>> describe_schedule((8, 4), (Step(3, (4, 2)), Step(6, (2, 2))))
    'K8-4-2 V4-2-2 @3,6'
    """
    pairs = [bits if isinstance(bits, tuple) else (bits, bits) for bits in (commit, *(step.bits for step in steps))]
    keys, values = ("-".join(str(pair[side]) for pair in pairs) for side in (0, 1))
    widths = keys if keys == values else f"K{keys} V{values}"
    return f"{widths} @{','.join(str(step.after) for step in steps)}"


def describe_kept(steps: tuple[Step, ...]) -> str:
    """The share that the last step keeps, as "best 25%"."""
    return f"best {steps[-1].keep:.0%}"


def policy_for_text(policy: Policy, text: int) -> Policy:
    """The policy as it is at the beginning of text number `text`: random ones then draw the same in every run."""
    return policy.for_text(text) if hasattr(policy, "for_text") else policy
