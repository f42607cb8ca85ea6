"""Packed buffers of the key/value cache: the tokens of all layers that share a device and a shape.

A `Bucket` holds tokens stored alike (same widths for keys and values, same fate), in the order they came; a
`PackedStore` holds the buckets of a group of layers and what encoding needs: centring vectors and the rotation.
Knows nothing of models, policies or attention.

Shapes: L layers, B rows of the batch, H key/value heads, C slots of a bucket, D head_dim.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from helpers.cache.bucket import EMPTY, SLOT_DIM, Bucket, Stage
from helpers.cache.quantization import FULL_WIDTH, bytes_per_vector, dequantize, quantize, rotation_matrix

CENTRE_TOKENS = 16


# Keys are centred by half the mean of their first tokens. Rotary embedding turns the mean of distant keys away from
# that of the first: with all of it 4-bit KL on far tokens of real text is 0.019, with half 0.015, with none 0.014;
# on texts of 256 tokens that the model wrote itself 0.010, 0.010 and 0.015 (stories3M). Centring values gains nothing.
CENTRE_SHARE = 0.5


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
