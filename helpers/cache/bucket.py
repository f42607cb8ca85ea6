"""A growing buffer of tokens that are stored alike."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

EMPTY = 255  # token index of a slot that holds no token; blocks are therefore at most 255 tokens long


SLOT_DIM = 3


MIN_GROWTH = 64


@dataclass(frozen=True, order=True)
class Stage:
    """How the tokens of a bucket are stored, and whether they are still to be settled."""

    key_bits: int
    value_bits: int
    pending: bool = False

    def bits(self, side: str) -> int:
        """Width of the "key" or of the "value" side."""
        return self.key_bits if side == "key" else self.value_bits


@dataclass
class Bucket:
    """One growing buffer `[L, B, H, capacity, ...]` a field; slots `start` to `end` are in use.

    `fields` holds `key_codes`, `value_codes` (uint8), `key_scales`, `value_scales` (float16 `[..., 2]`, absent at
    16 bits), `token` (uint8, index of the slot's token in its block, or `EMPTY`), `block_start`
    (int32 `[1, B, 1, capacity]`, position of the block's first token) and, where attention is recorded,
    `received` (float16). Rows may be filled unequally: `fill[row]` is the row's end, and slots beyond are `EMPTY`.
    """

    stage: Stage
    reserved: int = 0  # slots of the first allocation
    fields: dict[str, torch.Tensor] = field(default_factory=dict)
    start: int = 0
    fill: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    blocks: list[tuple[int, int]] = field(default_factory=list)  # of a pending bucket: (first position, slots)
    ragged: bool = False  # some slot in use is EMPTY: attention has to look

    @property
    def end(self) -> int:
        return int(self.fill.max(initial=0))

    @property
    def capacity(self) -> int:
        return self.fields["token"].shape[SLOT_DIM] if self.fields else 0

    @property
    def slots(self) -> int:
        return self.end - self.start

    def view(self, name: str, layer: int | slice = slice(None)) -> torch.Tensor:
        """The slots in use of one field, of all layers or of one."""
        return self.fields[name][:, :, :, self.start : self.end][layer]

    def live(self) -> dict[str, torch.Tensor]:
        """Every field, slots in use only."""
        return {name: self.view(name) for name in self.fields}

    def side(self, side: str, layer: int | slice = slice(None)) -> dict[str, torch.Tensor]:
        """Codes and scales of the "key" or of the "value" side, slots in use only."""
        return {name: self.view(name, layer) for name in self.fields if name.startswith(side)}

    def positions(self, layer: int | slice = slice(None)) -> torch.Tensor:
        """Position of each slot's token, int64 `[(L,) B, H, slots]`; meaningless where `token` is `EMPTY`."""
        return self.view("block_start", 0 if isinstance(layer, int) else slice(None)) + self.view("token", layer).long()

    def reserve(self, slots: int, example: dict[str, torch.Tensor]) -> None:
        """Make room for `slots` more slots after `end`; `example` gives each field's shape and dtype."""
        if self.end + slots <= self.capacity:
            return
        grown = self.capacity + max(self.capacity // 8, MIN_GROWTH)
        empty = {name: value[:, :, :, :0] for name, value in example.items()}
        self._rebuild(max(self.slots + slots, self.reserved, grown), self.live() or empty)

    def _rebuild(self, capacity: int, live: dict[str, torch.Tensor]) -> None:
        """Move the slots in use to the front of new buffers of `capacity` slots."""
        self.fill, self.start = self.fill - self.start, 0
        for name, value in live.items():
            shape = list(value.shape)
            used, shape[SLOT_DIM] = shape[SLOT_DIM], capacity
            buffer = value.new_full(shape, EMPTY) if name == "token" else value.new_zeros(shape)
            buffer[:, :, :, :used] = value
            self.fields[name] = buffer

    def append(self, content: dict[str, torch.Tensor], counts: np.ndarray | None = None, ragged: bool = False) -> None:
        """Add slots `[L, B, H, n, ...]` at the back; with `counts`, only the first `counts[row]` of each row.

        `ragged` says that some of the slots may be `EMPTY`.
        """
        n = content["token"].shape[SLOT_DIM]
        rows = content["token"].shape[1]
        if not self.fill.size:
            self.fill = np.zeros(rows, dtype=np.int64)
        self.reserve(n, content)
        at = self.fill.copy()
        if (at == at[0]).all():
            first = int(at[0])
            for name, value in content.items():
                self.fields[name][:, :, :, first : first + n] = value
        else:
            device = content["token"].device
            slot = torch.as_tensor(at, device=device)[:, None] + torch.arange(n, device=device)
            for name, value in content.items():
                index = slot.view(1, rows, 1, n, *[1] * (value.ndim - 4)).expand_as(value)
                self.fields[name].scatter_(SLOT_DIM, index, value)
        self.fill = at + (n if counts is None else counts)
        self.ragged = self.ragged or ragged or not (self.fill == self.fill[0]).all()

    def pop_blocks(self, most: int) -> tuple[dict[str, torch.Tensor], list[tuple[int, int]]]:
        """Take the oldest blocks out of a pending bucket, up to `most` of them and all of one size.

        Their space is reclaimed when half the buffer is free.
        """
        size = self.blocks[0][1]
        run = next((i for i, (_, slots) in enumerate(self.blocks[:most]) if slots != size), min(most, len(self.blocks)))
        taken, self.blocks = self.blocks[:run], self.blocks[run:]
        stop = self.start + run * size
        content = {name: value[:, :, :, self.start : stop].clone() for name, value in self.fields.items()}
        self.start = stop
        if self.start > self.capacity // 2:
            capacity = max(self.slots + MIN_GROWTH, self.capacity // 2) if self.slots else MIN_GROWTH
            self._rebuild(capacity, self.live())
        return content, taken

    def crop(self, length: int) -> None:
        """Drop the tokens at positions `length` and later; the others keep their codes and their slots.

        Slots behind the last token that any layer or head still holds are given back; others become `EMPTY`.
        """
        token = self.view("token")
        dropped = (self.positions() >= length) & (token != EMPTY)
        if not dropped.any():
            return
        token.masked_fill_(dropped, EMPTY)
        held = (token != EMPTY).any(0).any(1).cpu().numpy()  # [B, slots]
        behind_last = held.shape[1] - held[:, ::-1].argmax(-1)
        self.fill = self.start + np.where(held.any(-1), behind_last, 0)
        self.ragged = bool((self.view("token") == EMPTY).any())
        excess = sum(slots for _, slots in self.blocks) - self.slots
        while self.blocks and excess > 0:
            at, slots = self.blocks.pop()
            if slots > excess:
                self.blocks.append((at, slots - excess))
            excess -= slots

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`."""
        self.fields = {name: value.index_select(1, index) for name, value in self.fields.items()}
        if not self.ragged and len(index) == len(self.fill):
            return  # equal rows need no look at the index, which may be on another device
        self.fill = self.fill[index.cpu().numpy()]

    def tensors(self) -> Iterator[torch.Tensor]:
        yield from self.fields.values()
