"""`Layout`: which tokens lie where, as one layer or all of them see it; `Run`: blocks on their way between stages."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from helpers.cache.bucket import Bucket, Segment, Stage
from helpers.cache.tokens import EMPTY, SLOT_DIM, PackedTokens, joined


@dataclass
class Layout:
    """A bucket for every stage. Layers that agree share one layout; one that is ahead has a copy of its own."""

    buckets: dict[Stage, Bucket] = field(default_factory=dict)
    derived: dict[object, object] = field(default_factory=dict)  # what attention keeps from call to call

    def bucket(self, stage: Stage, reserved: int = 0) -> Bucket:
        """The bucket of a stage, made where there is none."""
        return self.buckets.setdefault(stage, Bucket(stage, reserved))

    def pending(self, stage: Stage) -> list[tuple[int, int]]:
        """First position and slots of each block that waits in a stage."""
        return self.buckets[stage].blocks if stage in self.buckets else []

    def changed(self) -> None:
        """Forget what was derived from the buckets: called before each change of them."""
        self.derived.clear()

    def copy(self) -> "Layout":
        """A layout that can go on by itself, over the same buffers."""
        return Layout({stage: bucket.copy() for stage, bucket in self.buckets.items()})

    def __getstate__(self) -> dict[str, object]:
        """A copy's tensors lie elsewhere, so that it derives anew."""
        return {"buckets": self.buckets, "derived": {}}

    def segments(self) -> list[tuple[Stage, Segment]]:
        """Every segment that holds tokens, with its stage."""
        return [(s, segment) for s, bucket in self.buckets.items() for segment in bucket.segments if segment.slots]


def leading(gone: np.ndarray) -> int:
    """How many tokens `gone` `[B, n]` takes from the beginning of every row; 0 where rows differ."""
    last = int(gone.any(0).nonzero()[0].max(initial=-1)) + 1
    return last if gone[:, :last].all() else 0


@dataclass
class Run:
    """Consecutive blocks of one size on their way from one stage to the next."""

    tokens: PackedTokens
    first: int  # position of the first token
    size: int  # slots of a block
    ragged: bool = False  # some slots may be `EMPTY`

    @property
    def blocks(self) -> int:
        return self.tokens.token.shape[SLOT_DIM] // self.size

    def without(self, gone: np.ndarray) -> "Run":
        """The same slots, of which those in `gone` `[B, up to n]` are `EMPTY`."""
        if not gone.any():
            return self
        token = self.tokens.token.clone()
        token[..., : gone.shape[1]].masked_fill_(torch.as_tensor(gone, device=token.device)[None, :, None], EMPTY)
        return replace(self, tokens=replace(self.tokens, token=token), ragged=True)

    def parted(self, gone: np.ndarray) -> "list[Run]":
        """The same blocks without the tokens in `gone` `[B, up to n]`, as runs.

        Where these are the first of every row no slot is `EMPTY`: what is left of their last block is a shorter one.
        """
        last = leading(gone)
        done = -(-(last or int(gone.any(0).nonzero()[0].max()) + 1) // self.size)  # blocks that are touched
        if not last:
            touched = self.part(0, done).without(gone[:, : done * self.size])
        elif last < done * self.size:
            rest = self.part(done - 1, done)
            cut = last - (done - 1) * self.size
            tokens = rest.tokens.map(lambda x: x[:, :, :, cut:])
            touched = Run(tokens, rest.first + cut, self.size - cut, self.ragged)
        else:
            touched = None
        return [run for run in (touched, self.part(done, self.blocks)) if run is not None and run.blocks]

    def part(self, start: int, stop: int) -> "Run":
        """The blocks from number `start` up to `stop`."""
        used = slice(start * self.size, stop * self.size)
        tokens = self.tokens.map(lambda x: x[:, :, :, used])
        return replace(self, tokens=tokens, first=self.first + start * self.size)


def pop_runs(bucket: Bucket, layers: slice, blocks: int) -> list[Run]:
    """Take the oldest `blocks` out of a pending bucket, those of one size together."""
    groups: list[list[Run]] = []
    for _ in range(blocks):
        segment, first = bucket.pop_block()
        run = Run(segment.used(layers), first, segment.slots, segment.ragged)
        if groups and groups[-1][0].size == run.size:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [
        Run(joined([run.tokens for run in runs]), runs[0].first, runs[0].size, any(run.ragged for run in runs))
        for runs in groups
    ]
