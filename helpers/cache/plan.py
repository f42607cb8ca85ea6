"""`Plan`: what happens to blocks of tokens by itself, without anybody looking at logits.

A block is committed at one width; steps may move it to lower widths as it ages, and the last one may let each head
keep its best tokens. Which tokens those are says a function of what is known when a block settles, `Demotion`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from helpers.cache.quantization import Widths, check_width, width_pair


@dataclass(frozen=True)
class Step:
    """Once `after` blocks came later, a block moves to `bits` (keys, values); each head leaves its best `keep` share.

    `keep` is one share, or one of keys and one of values: the same ranking serves both, so that of the tokens of the
    larger share the best leave the other side as it is too. Only the last step of a schedule may keep tokens: it
    settles the block.
    """

    after: int
    bits: Widths
    keep: float | tuple[float, float] = 0.0

    def __post_init__(self):
        for bits in self.bits if isinstance(self.bits, tuple) else (self.bits,):
            check_width(bits)
        if self.after < 1:
            raise ValueError(f"after must be a number of blocks, 1 or more, got {self.after}")
        if len(self.shares) != 2 or not all(0 <= share <= 1 for share in self.shares):
            pair = "; a pair is one of keys and one of values"
            raise ValueError(f"keep must be a share between 0 and 1, got {self.keep}{pair}")

    @property
    def pair(self) -> tuple[int, int]:
        """Key bits and value bits."""
        return width_pair(self.bits)

    @property
    def shares(self) -> tuple[float, float]:
        """The share of keys and of values that stay as they are."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep, self.keep)

    def kept(self, block: int) -> tuple[int, int]:
        """How many keys and how many values of a block of `block` tokens each head leaves as they are."""
        return tuple(round(share * block) for share in self.shares)


@dataclass
class Demotion:
    """What is known of pending blocks at the moment they are settled, to choose by; `[L, B, H, slots]` each.

    Slots are in text order, `block` of them a block; `start` is the position of the first. The first dimension stands
    for the `layers`, by number, of `all_layers` that are stored together: for all of them while a text is decoded,
    for one alone while a prompt is read.
    """

    layers: range
    all_layers: int
    start: int
    block: int
    key_error: torch.Tensor  # squared error that the keys (of D numbers) would take on by moving to the lower width
    value_error: torch.Tensor
    received: torch.Tensor | None  # attention received from later blocks so far, where the cache records it


Scores = Callable[[Demotion], torch.Tensor]  # [L, B, H, slots]; tokens that score highest keep their width


@dataclass(frozen=True)
class Plan:
    """Blocks are committed at `bits` (a width, or one for keys and one for values) and move on by `steps`."""

    bits: Widths
    steps: tuple[Step, ...] = ()
    scores: Scores | None = None  # for steps that keep some tokens: which are best

    @property
    def pair(self) -> tuple[int, int]:
        """Key bits and value bits at commit."""
        return width_pair(self.bits)
