"""Where packed tokens lie: `Segment`, allocated once; `Bucket`, the segments of tokens that are stored alike.

A segment never grows and is never copied. A bucket takes a new one when its last is full, and lets go of one whose
tokens have all left, which gives the memory back. Nothing here knows how codes are made.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from helpers.cache.tokens import EMPTY, SLOT_DIM, PackedTokens

SPARE_SHARE = 16  # a new segment has room for this part of what its bucket holds
FIRST_SLOTS = 32  # at most, of a bucket that holds little


@dataclass(frozen=True, order=True)
class Stage:
    """How the tokens of a bucket are stored, and whether they are pending: still to be settled at another width."""

    key_bits: int
    value_bits: int
    pending: bool = False


# Buffers `[L, B, H, slots, ...]` for slots like the example's, of the same batch and heads and of all layers.
Allocate = Callable[[PackedTokens, int], PackedTokens]


@dataclass
class Segment:
    """Slots `start` to `fill` of some buffers. Rows may be filled unequally; what lies beyond a row's end is `EMPTY`.

    Copies share the buffers, so that one layer can be ahead of another in what it counts as filled.
    """

    buffers: PackedTokens
    fill: np.ndarray  # [B], end of each row
    ragged: bool = False  # some slot in use is EMPTY: attention has to look

    @property
    def slots(self) -> int:
        """Number of slots in use."""
        return int(self.fill.max(initial=0))

    @property
    def capacity(self) -> int:
        return self.buffers.token.shape[SLOT_DIM]

    def used(self, layer: int | slice = slice(None)) -> PackedTokens:
        """The slots in use, as views: of some layers, or of one and then without that dimension."""
        used = self.slots

        def view(x: torch.Tensor) -> torch.Tensor:
            which = layer if x.shape[0] > 1 else (0 if isinstance(layer, int) else slice(None))  # block starts: one
            return x[which, :, :, :used]

        return self.buffers.map(view)

    def write(self, tokens: PackedTokens, layers: slice, done: np.ndarray, take: np.ndarray, ragged: bool) -> None:
        """Add slots `done[row]` to `done[row] + take[row]` of `tokens` to each row, in the layers `layers`."""
        even = (self.fill == self.fill[0]).all() and (done == done[0]).all() and (take == take[0]).all()
        rows = [slice(None)] if even else [slice(row, row + 1) for row in range(len(take))]
        buffers = self.buffers.named()
        for name, new in tokens.named().items():
            buffer = buffers[name]
            buffer = buffer[layers] if buffer.shape[0] > 1 else buffer
            for row, at, first, n in zip(rows, self.fill.tolist(), done.tolist(), take.tolist()):
                buffer[:, row, :, at : at + n] = new[:, row, :, first : first + n]
        self.fill = self.fill + take
        self.ragged = self.ragged or ragged or not (self.fill == self.fill[0]).all()

    def crop(self, length: int) -> None:
        """Drop the tokens at positions `length` and later; slots behind the last that stays are free again."""
        held = self.used()
        token = held.token
        dropped = (held.positions() >= length) & (token != EMPTY)
        if dropped.any():
            token.masked_fill_(dropped, EMPTY)
            used = (token != EMPTY).any(0).any(1).cpu().numpy()  # [B, slots]
            self.fill = np.where(used.any(-1), used.shape[1] - used[:, ::-1].argmax(-1), 0)
            self.ragged = bool((self.used().token == EMPTY).any())

    def map_rows(self, index: torch.Tensor) -> "Segment":
        """The same slots for the rows `index` of the batch."""
        buffers = self.buffers.map(lambda x: x.index_select(1, index))
        if self.ragged or len(index) != len(self.fill):  # equal rows need no look at it; it may be on another device
            return Segment(buffers, self.fill[index.cpu().numpy()], self.ragged)
        return Segment(buffers, self.fill, self.ragged)


@dataclass
class Bucket:
    """Tokens of one `Stage`. A pending bucket has a segment a block, in text order, so that each can leave alone."""

    stage: Stage
    reserved: int = 0  # slots of the first segment, where the user asked for them
    segments: list[Segment] = field(default_factory=list)
    blocks: list[tuple[int, int]] = field(default_factory=list)  # of a pending bucket: (first position, slots)
    expected: int = 0  # slots that are about to come, to be allocated in one piece

    @property
    def slots(self) -> int:
        """Number of slots in use."""
        return sum(segment.slots for segment in self.segments)

    def copy(self) -> "Bucket":
        """A bucket that can go on by itself, over the same buffers."""
        segments = [replace(segment) for segment in self.segments]
        return Bucket(self.stage, self.reserved, segments, list(self.blocks), self.expected)

    def append(
        self,
        tokens: PackedTokens,
        layers: slice,
        allocate: Allocate,
        counts: np.ndarray | None = None,
        ragged: bool = False,
        exact: bool = False,
    ) -> None:
        """Add slots at the back of the layers `layers`; with `counts`, only the first `counts[row]` of each row.

        `ragged` says that some of the slots may be `EMPTY`, `exact` that no room is made for more.
        """
        rows, n = tokens.token.shape[1], tokens.token.shape[SLOT_DIM]
        counts = np.full(rows, n) if counts is None else counts
        done = np.zeros(rows, dtype=np.int64)
        for segment in self.segments:
            if (segment.fill < segment.capacity).any():
                take = np.minimum(counts - done, segment.capacity - segment.fill)
                segment.write(tokens, layers, done, take, ragged)
                done = done + take
        rest = int((counts - done).max(initial=0))
        self.expected = max(0, self.expected - (n - rest))
        if rest:
            self.segments.append(
                Segment(allocate(tokens, rest if exact else self._capacity(rest, n)), np.zeros(rows, dtype=np.int64))
            )
            self.segments[-1].write(tokens, layers, done, counts - done, ragged)
        self.expected = max(0, self.expected - rest)

    def _capacity(self, rest: int, n: int) -> int:
        """Slots of a new segment that takes `rest` of `n` appended slots."""
        if self.stage.pending:
            return rest
        first = 0 if self.segments else self.reserved
        return max(rest, self.expected, first, min(2 * n, FIRST_SLOTS), self.slots // SPARE_SHARE)

    def append_block(
        self, tokens: PackedTokens, layers: slice, allocate: Allocate, first: int, ragged: bool = False
    ) -> None:
        """Add a block of a pending bucket, whose first token is at position `first`, in a segment of its own."""
        rows, n = tokens.token.shape[1], tokens.token.shape[SLOT_DIM]
        segment = Segment(allocate(tokens, n), np.zeros(rows, dtype=np.int64))
        segment.write(tokens, layers, np.zeros(rows, dtype=np.int64), np.full(rows, n), ragged)
        self.segments.append(segment)
        self.blocks.append((first, n))

    def put_back(self, tokens: PackedTokens, layers: slice, allocate: Allocate, first: int, ragged: bool) -> None:
        """Add a block at the front of a pending bucket: the rest of one that was popped."""
        self.append_block(tokens, layers, allocate, first, ragged)
        self.segments.insert(0, self.segments.pop())
        self.blocks.insert(0, self.blocks.pop())

    def pop_block(self) -> tuple[Segment, int]:
        """Take out the oldest pending block: its segment, and the position of its first token."""
        return self.segments.pop(0), self.blocks.pop(0)[0]

    def crop(self, length: int) -> None:
        """Drop the tokens at positions `length` and later; the others keep their codes and their slots."""
        for segment in self.segments:
            segment.crop(length)
        self._drop_empty()

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`."""
        self.segments = [segment.map_rows(index) for segment in self.segments]
        self._drop_empty()

    def _drop_empty(self) -> None:
        """Give back segments that hold nothing any more."""
        if self.stage.pending:
            self.blocks = [(first, s.slots) for (first, _), s in zip(self.blocks, self.segments) if s.slots]
        self.segments = [segment for segment in self.segments if segment.slots]
