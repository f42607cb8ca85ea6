"""Packed buffers of the key/value cache: the tokens of all layers that share a device and a shape.

A `Bucket` holds tokens stored alike (same widths for keys and values, same fate), in the order they came; a
`PackedStore` holds the buckets of a group of layers and what encoding needs: centring vectors and the rotation.
Knows nothing of models, policies or attention.

Shapes: L layers, B rows of the batch, H key/value heads, C slots of a bucket, D head_dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from helpers.quantization import FULL_WIDTH, bytes_per_vector, dequantize, quantize, rotation_matrix

EMPTY = 255  # token index of a slot that holds no token; blocks are therefore at most 255 tokens long
SLOT_DIM = 3
MIN_GROWTH = 64
CENTRE_TOKENS = 16
# Keys are centred by half the mean of their first tokens. Rotary embedding turns the mean of distant keys away from
# that of the first: with all of it 4-bit KL on far tokens of real text is 0.019, with half 0.015, with none 0.014;
# on texts of 256 tokens that the model wrote itself 0.010, 0.010 and 0.015 (stories3M). Centring values gains nothing.
CENTRE_SHARE = 0.5


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
class Demotion:
    """What is known of pending blocks at the moment they are settled, to choose by; `[L, B, H, slots]` each.

    Slots are in text order, `block` of them a block; `start` is the position of the first.
    """

    layers: list[int]  # of the model
    start: int
    block: int
    key_error: torch.Tensor  # squared error that the keys (of D numbers) would take on by moving to the lower width
    value_error: torch.Tensor
    received: torch.Tensor | None  # attention received from later blocks so far, where the cache records it


Scores = torch.Tensor | Callable[[Demotion], torch.Tensor]


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


class PackedStore:
    """The packed tokens of the layers `layers`, which share a device, `kv_heads` and head dimensions."""

    def __init__(
        self,
        layers: list[int],
        key: torch.Tensor,
        value: torch.Tensor,
        quantizer: str,
        reserved: int | None = None,
    ):
        """`key`, `value`: `[B, H, n, D]` of any of the layers, for shapes, dtype and device.

        `reserved`: slots that each bucket allocates at once.
        """
        self.layers = layers
        self.quantizer = quantizer
        self.reserved = reserved or 0
        self.device = key.device
        self.dtype = torch.promote_types(key.dtype, torch.float32)
        self.full_dtype = torch.bfloat16 if key.dtype == torch.bfloat16 else torch.float16
        self.buckets: dict[Stage, Bucket] = {}
        self.derived: dict[str, object] = {}  # what readers of the buckets keep from call to call; see `changed`
        self.rotation: dict[str, torch.Tensor] = {}
        self.centre: torch.Tensor | None = None
        if quantizer == "rotated":
            dims = {"key": key.shape[-1], "value": value.shape[-1]}
            matrices = {dim: rotation_matrix(dim).to(key.device, self.dtype) for dim in dims.values()}
            self.rotation = {side: matrices[dim] for side, dim in dims.items()}

    def changed(self) -> None:
        """Forget what was derived from the buckets: called before each change of them."""
        self.derived.clear()

    def __getstate__(self) -> dict[str, object]:
        """A copy's tensors lie elsewhere, so that it derives anew."""
        return {**self.__dict__, "derived": {}}

    def set_centre(self, keys: torch.Tensor, weights: torch.Tensor) -> None:
        """Fix the centring vectors `[L, B, H, D]`, a share of the weighted mean of `keys` `[L, B, H, n, D]`.

        `weights` `[B, n]` is 1 for the tokens to average and 0 for others.
        """
        weights = weights.to(self.dtype)
        mean = torch.einsum("lbhnd,bn->lbhd", keys.to(self.dtype), weights) / weights.sum(-1)[None, :, None, None]
        self.centre = (CENTRE_SHARE * mean).contiguous()  # einsum leaves any order of strides

    def encode(self, states: torch.Tensor, side: str, bits: int) -> dict[str, torch.Tensor]:
        """Codes (and scales) of `states` `[L, B, H, n, D]`; 16 bits is half precision as is."""
        bytes_per_vector(states.shape[-1], bits)
        if bits == FULL_WIDTH:
            return {f"{side}_codes": states.to(self.full_dtype).contiguous().view(torch.uint8)}
        codes, scales = self._quantize(self._turned(states.to(self.dtype), side), bits)
        return {f"{side}_codes": codes, f"{side}_scales": scales}

    def _turned(self, x: torch.Tensor, side: str) -> torch.Tensor:
        """States `[L, B, H, n, D]` in the coordinates in which they are quantized: centred and rotated."""
        if side == "key" and self.centre is not None:
            x = x - self.centre[:, :, :, None]
        return x @ self.rotation[side] if self.rotation else x

    def _quantize(self, x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize(x, bits, search=self.quantizer == "rotated")

    def read(self, content: dict[str, torch.Tensor], side: str, bits: int) -> torch.Tensor:
        """The numbers that are stored: at 16 bits the states themselves, below that their centred, rotated form."""
        codes = content[f"{side}_codes"]
        if bits == FULL_WIDTH:
            return codes.contiguous().view(self.full_dtype).to(self.dtype)
        return dequantize(codes, content[f"{side}_scales"], bits, self.dtype)

    def decode(self, content: dict[str, torch.Tensor], side: str, bits: int, layer: int | slice) -> torch.Tensor:
        """Inverse of `encode` up to its error, for the fields of one layer or of all: `[(L,) B, H, n, D]`."""
        x = self.read(content, side, bits)
        if bits == FULL_WIDTH:
            return x
        if self.rotation:
            x = x @ self.rotation[side].T
        if side == "key" and self.centre is not None:
            x = x + self.centre[layer].unsqueeze(-2)
        return x

    def relative_error(self, states: torch.Tensor, side: str, bits: int) -> torch.Tensor:
        """Squared error of storing `states` `[L, B, H, n, D]` at `bits`, over their squared length: `[L, B, H, n]`."""
        x = states.to(self.dtype)
        if bits == FULL_WIDTH:
            change = states.to(self.full_dtype).to(self.dtype) - x
        else:
            turned = self._turned(x, side)  # where distances are the same
            change = dequantize(*self._quantize(turned, bits), bits, self.dtype) - turned
        return change.square_().sum(-1) / x.square().sum(-1).clamp(min=1e-12)

    def commit(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        widths: np.ndarray | tuple[int, int],
        first: int,
        block: int,
        pending: bool,
        received: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Quantize `keys`, `values` `[L, B, H, n, D]`, the tokens at positions `first, first + 1, ...`.

        `widths` is one pair (key bits, value bits) for all tokens, or an array `[B, n]` of the width of each.
        `received` `[L, B, H, n]` is the attention that pending tokens got while they were in the tail. Returns one
        number: finite if everything that was stored is, see `_total`.
        """
        self.changed()
        layers, rows, heads, n = keys.shape[:4]
        index = torch.arange(n, device=keys.device)
        token = (index % block).to(torch.uint8).expand(layers, rows, heads, n)
        block_start = (first + index // block * block).to(torch.int32).expand(1, rows, 1, n)
        if isinstance(widths, tuple):
            content = {
                **self.encode(keys, "key", widths[0]),
                **self.encode(values, "value", widths[1]),
                "token": token,
                "block_start": block_start,
            }
            if received is not None:
                content["received"] = received.half()  # sums of at most a few thousand shares: half precision will do
            bucket = self._bucket(Stage(*widths, pending))
            bucket.append(content)
            if pending:
                bucket.blocks += [(first + i, min(block, n - i)) for i in range(0, n, block)]
            return self._total(content)
        totals = []
        for bits in np.unique(widths):
            chosen = widths == bits
            counts = chosen.sum(-1)
            most = int(counts.max())
            # Stable order by "not chosen" lists each row's chosen tokens first, in text order.
            order = np.argsort(~chosen, axis=-1, kind="stable")[:, :most]
            slots = torch.as_tensor(order, device=keys.device)[None, :, None]
            valid = torch.as_tensor(np.arange(most) < counts[:, None], device=keys.device)[None, :, None]
            content = {
                **self.encode(_take(keys, slots), "key", int(bits)),
                **self.encode(_take(values, slots), "value", int(bits)),
                "token": _take(token, slots).masked_fill(~valid, EMPTY),
                "block_start": _take(block_start, slots),
            }
            self._bucket(Stage(int(bits), int(bits))).append(content, counts)
            totals.append(self._total(content))
        return sum(totals)

    def _total(self, content: dict[str, torch.Tensor]) -> torch.Tensor:
        """Sum of the magnitudes of all scales and zeros (at 16 bits: of the states), one float32.

        Codes are always sound. A state that is NaN makes this NaN; one that is infinite or too large, infinite or NaN.
        """
        total = 0
        for side in ("key", "value"):
            held = content.get(f"{side}_scales")
            held = content[f"{side}_codes"].view(self.full_dtype) if held is None else held
            total = total + held.abs().sum(dtype=torch.float32)
        return total

    def settle(
        self, source: Stage, target: tuple[int, int], blocks: int, keep: int, scores: Scores | None, pending: bool
    ) -> None:
        """Re-quantize the oldest `blocks` of the pending bucket `source` to `target` (key bits, value bits).

        With `keep`, each layer, row and head leaves the `keep` tokens of a block that score highest at the widths
        they have; all are then settled. `scores` is `[L, B, H, slots]` or a function from `Demotion` to that.
        """
        self.changed()
        at = 0
        while blocks:
            content, taken = self.buckets[source].pop_blocks(blocks)
            blocks -= len(taken)
            slots = len(taken) * taken[0][1]
            part = scores[..., at : at + slots] if isinstance(scores, torch.Tensor) else scores
            self._settle_run(source, target, content, taken, keep, part, pending)
            at += slots

    def _settle_run(
        self,
        source: Stage,
        target: tuple[int, int],
        content: dict[str, torch.Tensor],
        taken: list[tuple[int, int]],
        keep: int,
        scores: Scores | None,
        pending: bool,
    ) -> None:
        """Settle `content`, the slots of the blocks `taken`, which are all of one size."""
        ragged = self.buckets[source].ragged
        size = taken[0][1]
        keep = min(keep, size)
        received = content.get("received") if pending else content.pop("received", None)
        moved = {name: value for name, value in content.items() if not name.startswith(("key", "value"))}
        errors = {}
        for side, new in zip(("key", "value"), target, strict=True):
            coded, errors[side] = self._requantize(content, side, source.bits(side), new, want_error=callable(scores))
            moved |= coded
        if keep:
            if callable(scores):
                known = None if received is None else received.float()
                scores = scores(Demotion(self.layers, taken[0][0], size, errors["key"], errors["value"], known))
            if scores.shape != content["token"].shape:
                raise ValueError(
                    f"scores must have shape {list(content['token'].shape)} (layers, rows, heads, tokens of the "
                    f"blocks), got {list(scores.shape)}"
                )
            scores = scores.masked_fill(content["token"] == EMPTY, -torch.inf).unflatten(-1, (-1, size))
            order = scores.argsort(dim=-1, descending=True, stable=True)
            order = order + torch.arange(0, len(taken) * size, size, device=order.device)[:, None]
            kept, rest = (part.sort(-1).values.flatten(-2) for part in order.split([keep, size - keep], dim=-1))
            stay = {name: _take(value, kept) for name, value in content.items()}
            self._bucket(Stage(source.key_bits, source.value_bits)).append(stay, ragged=ragged)
            if keep == size:
                return
            moved = {name: _take(value, rest) for name, value in moved.items()}
        bucket = self._bucket(Stage(*target, pending))
        bucket.append(moved, ragged=ragged)
        if pending:
            bucket.blocks += taken

    def _requantize(
        self, content: dict[str, torch.Tensor], side: str, old: int, new: int, want_error: bool
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """One side of `content` moved from `old` to `new` bits, and (if wanted) each vector's squared change."""
        if old == new:
            same = {name: value for name, value in content.items() if name.startswith(side)}
            return same, torch.zeros_like(content["token"], dtype=self.dtype)
        if FULL_WIDTH in (old, new):
            before = self.decode(content, side, old, slice(None))
            coded = self.encode(before, side, new)
        else:  # both widths code the same centred, rotated numbers
            before = self.read(content, side, old)
            codes, scales = self._quantize(before, new)
            coded = {f"{side}_codes": codes, f"{side}_scales": scales}
        error = None
        if want_error:
            after = (
                self.decode(coded, side, new, slice(None)) if FULL_WIDTH in (old, new) else self.read(coded, side, new)
            )
            error = (after - before).square().sum(-1)
        return coded, error

    def _bucket(self, stage: Stage) -> Bucket:
        return self.buckets.setdefault(stage, Bucket(stage, self.reserved))

    def token_bits(self, length: int) -> torch.Tensor:
        """Average width of the codes of each committed token over layers, heads and sides, float32 `[B, length]`."""
        layers, rows, heads = next(iter(self.buckets.values())).view("token").shape[:3]
        total = torch.zeros(rows, length + 1, device=self.device)
        for stage, bucket in self.buckets.items():
            token = bucket.view("token")
            at = bucket.positions().masked_fill(token == EMPTY, length).transpose(0, 1).flatten(1)
            bits = torch.full_like(at, (stage.key_bits + stage.value_bits) / 2, dtype=torch.float32)
            total.scatter_add_(1, at, bits)
        return total[:, :length] / (layers * heads)

    def dense(self, side: str, layer: int, length: int) -> torch.Tensor:
        """Keys or values of the committed tokens of one layer in text order, dequantized: `[B, H, length, D]`."""
        result = None
        for stage, bucket in self.buckets.items():
            if not bucket.slots:
                continue
            x = self.decode(bucket.side(side, layer), side, stage.bits(side), layer)
            if result is None:
                # One row more than needed takes what empty slots hold.
                result = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
            at = bucket.positions(layer).masked_fill(bucket.view("token", layer) == EMPTY, length)
            result.scatter_(2, at[..., None].expand_as(x), x)
        return result[:, :, :length]

    def crop(self, length: int) -> None:
        self.changed()
        for bucket in self.buckets.values():
            bucket.crop(length)
        self.buckets = {stage: bucket for stage, bucket in self.buckets.items() if bucket.slots}

    def map_rows(self, index: torch.Tensor) -> None:
        self.changed()
        for bucket in self.buckets.values():
            bucket.map_rows(index)
        if self.centre is not None:
            self.centre = self.centre.index_select(1, index)

    def to(self, device: torch.device | str) -> None:
        self.changed()
        self.device = torch.device(device)
        for bucket in self.buckets.values():
            bucket.fields = {name: value.to(device) for name, value in bucket.fields.items()}
        moved = {id(value): value.to(device) for value in self.rotation.values()}
        self.rotation = {side: moved[id(value)] for side, value in self.rotation.items()}
        self.centre = None if self.centre is None else self.centre.to(device)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor this store owns."""
        for bucket in self.buckets.values():
            yield from bucket.tensors()
        yield from {id(value): value for value in self.rotation.values()}.values()
        if self.centre is not None:
            yield self.centre


def _take(value: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Slots `index` `[L or 1, B, H or 1, k]` of a field `[L or 1, B, H or 1, n, ...]`."""
    # A field without layers or heads is only ever asked for slots on which they agree, so the first will do.
    index = index[: value.shape[0], :, : value.shape[2]]
    at = index.reshape(*index.shape, *[1] * (value.ndim - 4))
    return value.gather(SLOT_DIM, at.expand(*value.shape[:SLOT_DIM], index.shape[-1], *value.shape[4:]))
