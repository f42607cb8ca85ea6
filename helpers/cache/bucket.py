"""`Bucket`: a growing buffer of tokens that are stored alike, in the order in which they came.

A bucket knows which of its slots are in use and, if its tokens wait to be settled, which blocks they belong to. It
knows nothing of how codes are made.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from helpers.cache.tokens import EMPTY, SLOT_DIM, PackedTokens

MIN_GROWTH = 64  # slots


@dataclass(frozen=True, order=True)
class Stage:
    """How the tokens of a bucket are stored, and whether they are pending: still to be settled at another width."""

    key_bits: int
    value_bits: int
    pending: bool = False


@dataclass
class Bucket:
    """Tokens of one `Stage` in buffers of `capacity` slots, of which those from `start` to `end` are in use.

    Rows may be filled unequally: `fill[row]` is the row's end, and slots beyond it are `EMPTY`.
    """

    stage: Stage
    reserved: int = 0  # slots of the first allocation
    buffers: PackedTokens | None = None  # until the first tokens come
    start: int = 0
    fill: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    blocks: list[tuple[int, int]] = field(default_factory=list)  # of a pending bucket: (first position, slots)
    ragged: bool = False  # some slot in use is EMPTY: attention has to look

    @property
    def end(self) -> int:
        return int(self.fill.max(initial=0))

    @property
    def capacity(self) -> int:
        return self.buffers.token.shape[SLOT_DIM] if self.buffers else 0

    @property
    def slots(self) -> int:
        """Number of slots in use."""
        return self.end - self.start

    def held(self, layer: int | None = None) -> PackedTokens:
        """The slots in use, as views: of all layers, or of one and then without that dimension."""
        used = slice(self.start, self.end)
        if layer is None:
            return self.buffers.map(lambda x: x[:, :, :, used])
        return self.buffers.map(lambda x: x[min(layer, len(x) - 1), :, :, used])  # block starts have one for all

    def append(self, tokens: PackedTokens, counts: np.ndarray | None = None, ragged: bool = False) -> None:
        """Add slots at the back; with `counts`, only the first `counts[row]` of each row.

        `ragged` says that some of the slots may be `EMPTY`.
        """
        rows, n = tokens.token.shape[1], tokens.token.shape[SLOT_DIM]
        if not self.fill.size:
            self.fill = np.zeros(rows, dtype=np.int64)
        self._reserve(n, tokens)
        at, buffers = self.fill, self.buffers.named()
        if (at == at[0]).all():
            first = int(at[0])
            for name, new in tokens.named().items():
                buffers[name][:, :, :, first : first + n] = new
        else:
            device = tokens.token.device
            slot = torch.as_tensor(at, device=device)[:, None] + torch.arange(n, device=device)
            for name, new in tokens.named().items():
                index = slot.view(1, rows, 1, n, *[1] * (new.ndim - 4)).expand_as(new)
                buffers[name].scatter_(SLOT_DIM, index, new)
        self.fill = at + (n if counts is None else counts)
        self.ragged = self.ragged or ragged or not (self.fill == self.fill[0]).all()

    def _reserve(self, slots: int, example: PackedTokens) -> None:
        """Make room for `slots` more slots after `end`; `example` gives shapes and dtypes."""
        if self.end + slots <= self.capacity:
            return
        grown = self.capacity + max(self.capacity // 8, MIN_GROWTH)
        held = self.held() if self.buffers else example.map(lambda x: x[:, :, :, :0])
        self._rebuild(max(self.slots + slots, self.reserved, grown), held)

    def _rebuild(self, capacity: int, held: PackedTokens) -> None:
        """Move the slots `held` to the front of new buffers of `capacity` slots."""
        self.fill, self.start = self.fill - self.start, 0
        used = held.token.shape[SLOT_DIM]

        def moved(x: torch.Tensor) -> torch.Tensor:
            buffer = x.new_zeros(*x.shape[:SLOT_DIM], capacity, *x.shape[SLOT_DIM + 1 :])
            buffer[:, :, :, :used] = x
            return buffer

        self.buffers = held.map(moved)
        self.buffers.token[:, :, :, used:] = EMPTY

    def pop_blocks(self, most: int) -> tuple[PackedTokens, list[tuple[int, int]]]:
        """Take the oldest blocks out of a pending bucket, up to `most` of them and all of one size.

        Their space is reclaimed when half the buffer is free.
        """
        size = self.blocks[0][1]
        run = next((i for i, (_, slots) in enumerate(self.blocks[:most]) if slots != size), min(most, len(self.blocks)))
        taken, self.blocks = self.blocks[:run], self.blocks[run:]
        stop = self.start + run * size
        tokens = self.buffers.map(lambda x: x[:, :, :, self.start : stop].clone())
        self.start = stop
        if self.start > self.capacity // 2:
            capacity = max(self.slots + MIN_GROWTH, self.capacity // 2) if self.slots else MIN_GROWTH
            self._rebuild(capacity, self.held())
        return tokens, taken

    def crop(self, length: int) -> None:
        """Drop the tokens at positions `length` and later; the others keep their codes and their slots.

        Slots behind the last token that any layer or head still holds are given back; others become `EMPTY`.
        """
        held = self.held()
        token = held.token
        dropped = (held.positions() >= length) & (token != EMPTY)
        if not dropped.any():
            return
        token.masked_fill_(dropped, EMPTY)
        used = (token != EMPTY).any(0).any(1).cpu().numpy()  # [B, slots]
        behind_last = used.shape[1] - used[:, ::-1].argmax(-1)
        self.fill = self.start + np.where(used.any(-1), behind_last, 0)
        self.ragged = bool((self.held().token == EMPTY).any())
        excess = sum(slots for _, slots in self.blocks) - self.slots
        while self.blocks and excess > 0:
            at, slots = self.blocks.pop()
            if slots > excess:
                self.blocks.append((at, slots - excess))
            excess -= slots

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`."""
        self.buffers = self.buffers.map(lambda x: x.index_select(1, index))
        if self.ragged or len(index) != len(self.fill):  # equal rows need no look at it; it may be on another device
            self.fill = self.fill[index.cpu().numpy()]
