"""Schedules: blocks move to lower widths with age, and each head may keep its best tokens.

`Schedule` is the movement alone; `AgeSchedule` ranks what is kept by hand-made scores. The learned ranking is in
`learned.py`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from helpers.cache import Demotion, Plan, Step
from helpers.cache.quantization import Widths, width_pair
from helpers.policies.features import TokenFeatures
from helpers.policies.policy import Policy

RANKINGS = ("random", "attention", "attention x error")


@dataclass(frozen=True)
class Schedule(Policy):
    """Blocks are committed at one width and demoted with age; the last step may let each head keep its best tokens.

    Reads no logits, so that it works in plain `generate()` and under beams. Raises `ValueError` unless ages rise and
    only the last step keeps tokens.

    >>> Schedule(8, (Step(3, (8, 4)), Step(6, (4, 2)))).movement  # widths in order, and ages in blocks
    'K8-8-4 V8-4-2 @3,6'
    """

    commit: Widths
    steps: tuple[Step, ...]

    def __post_init__(self):
        if not self.steps:
            raise ValueError("a schedule needs one step or more; use FixedBits for none")
        ages = [step.after for step in self.steps]
        if ages != sorted(set(ages)):
            raise ValueError(f"the steps of a schedule must come at rising ages, got {ages}")
        if any(any(step.shares) for step in self.steps[:-1]):
            raise ValueError("only the last step of a schedule may keep tokens")

    @property
    def movement(self) -> str:
        """`8-4-2 @3,6`: widths in order and ages in blocks; keys and values apart where they differ."""
        sides = zip(*(width_pair(bits) for bits in (self.commit, *(step.bits for step in self.steps))))
        keys, values = ("-".join(map(str, bits if len(set(bits)) > 1 else bits[:1])) for bits in sides)
        widths = keys if keys == values else f"K{keys} V{values}"
        return f"{widths} @{','.join(str(step.after) for step in self.steps)}"

    @property
    def keeps(self) -> bool:
        """Whether heads keep some tokens of each block, so that something has to rank them."""
        return any(self.steps[-1].shares)

    @property
    def kept(self) -> str:
        """`best 25%`, or `best K25% V50%` where keys and values keep shares of their own; of sides that move at all."""
        before = width_pair(self.commit if len(self.steps) == 1 else self.steps[-2].bits)
        moves = [old != new for old, new in zip(before, self.steps[-1].pair, strict=True)]
        shares = [f"{share:.0%}" for share in self.steps[-1].shares]
        if all(moves) and shares[0] == shares[1]:
            return f"best {shares[0]}"
        return "best " + " ".join(side + share for side, share, moved in zip("KV", shares, moves, strict=True) if moved)

    @property
    def needs_received(self) -> bool:
        return self.keeps

    @property
    def plan(self) -> Plan:
        return Plan(self.commit, self.steps, self.scores if self.keeps else None)

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> Widths:
        return self.commit


@dataclass(frozen=True)
class AgeSchedule(Schedule):
    """A schedule whose `ranking` says which tokens are best.

    "random" (the control), "attention" (received from later blocks so far) or "attention x error" (times the squared
    change that the demotion makes to the token's key and value).
    """

    ranking: str = "attention x error"
    seed: int = 0
    text: int = 0

    def __post_init__(self):
        super().__post_init__()
        if self.ranking not in RANKINGS:
            raise ValueError(f"ranking must be one of {RANKINGS}, got {self.ranking!r}")

    @property
    def name(self) -> str:
        return self.movement + (f", {self.kept} by {self.ranking}" if self.keeps else "")

    @property
    def needs_received(self) -> bool:
        return self.keeps and self.ranking != "random"

    def for_text(self, text: int) -> "AgeSchedule":
        """A copy whose random ranking belongs to text number `text`."""
        return replace(self, text=text)

    def scores(self, demotion: Demotion) -> torch.Tensor:
        if self.ranking == "random":
            return self._drawn(demotion).to(demotion.key_error.device)
        if self.ranking == "attention":
            return demotion.received
        return demotion.received * (demotion.key_error + demotion.value_error)

    def _drawn(self, demotion: Demotion) -> torch.Tensor:
        """Random scores: a block draws the same, whichever blocks and layers are settled together with it."""
        _, rows, heads, slots = demotion.key_error.shape
        size = demotion.all_layers, rows, heads, demotion.block
        starts = range(demotion.start, demotion.start + slots, demotion.block)
        draws = [np.random.default_rng((self.seed, self.text, at)).random(size) for at in starts]
        return torch.from_numpy(np.concatenate([draw[list(demotion.layers)] for draw in draws], axis=-1))


# Commit width and steps of the schedules that rankings are compared on, from many bytes to few. Ages and shares were
# chosen on training articles that SmolLM2 reads, by KL at equal held bytes: keys stay wider than values.
FINE_SCHEDULE: tuple[Widths, tuple[Step, ...]] = (8, (Step(3, 4, keep=1 / 16),))
QUALITY_SCHEDULE: tuple[Widths, tuple[Step, ...]] = ((8, 4), (Step(4, (4, 2), keep=(1 / 16, 1 / 2)),))
MIDDLE_SCHEDULE: tuple[Widths, tuple[Step, ...]] = (4, (Step(6, (4, 2), keep=1 / 4),))
COMPACT_SCHEDULE: tuple[Widths, tuple[Step, ...]] = (4, (Step(6, 2, keep=(1 / 2, 1 / 8)),))
SCHEDULES = (FINE_SCHEDULE, QUALITY_SCHEDULE, MIDDLE_SCHEDULE, COMPACT_SCHEDULE)
