"""Schedules: blocks move to lower widths with age, and each head may keep its best tokens."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from helpers.cache.quantization import Widths
from helpers.cache.store import Demotion
from helpers.policies.features import TokenFeatures
from helpers.policies.policy import Policy, Step

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


# Commit width and steps of the two schedules that rankings are compared on; ages and shares were chosen on stories
# that neither training nor test uses (stories3M).
QUALITY_SCHEDULE: tuple[Widths, tuple[Step, ...]] = (8, (Step(2, 4), Step(5, 2, keep=1 / 4)))


COMPACT_SCHEDULE: tuple[Widths, tuple[Step, ...]] = ((8, 4), (Step(3, (4, 2)), Step(6, (2, 2), keep=1 / 16)))


SCHEDULES = (QUALITY_SCHEDULE, COMPACT_SCHEDULE)
