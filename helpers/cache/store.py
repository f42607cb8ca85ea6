"""`PackedStore`: the packed tokens of all layers that share a device and a shape.

It has a codec for keys, one for values, and a `Bucket` for every width and fate that tokens have. Here tokens are
committed, settled and read back; nothing is known of models, policies or attention.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from helpers.cache.bucket import Bucket, Stage
from helpers.cache.codec import Codec, Codes, make_codecs
from helpers.cache.tokens import EMPTY, PackedTokens, take


@dataclass
class Demotion:
    """What is known of pending blocks at the moment they are settled, to choose by; `[L, B, H, slots]` each.

    Slots are in text order, `block` of them a block; `start` is the position of the first.
    """

    start: int
    block: int
    key_error: torch.Tensor  # squared error that the keys (of D numbers) would take on by moving to the lower width
    value_error: torch.Tensor
    received: torch.Tensor | None  # attention received from later blocks so far, where the cache records it


Scores = Callable[[Demotion], torch.Tensor]  # [L, B, H, slots]; tokens that score highest keep their width


class PackedStore:
    """The packed tokens of the layers `layers`, which share a device, `kv_heads` and head dimensions."""

    def __init__(
        self, layers: list[int], keys: torch.Tensor, values: torch.Tensor, quantizer: str, reserved: int | None = None
    ):
        """`keys`, `values` `[B, H, n, D]` are those of any of the layers, for shapes, dtype and device.

        `reserved`: slots that each bucket allocates at once.
        """
        self.layers, self.reserved, self.device = layers, reserved or 0, keys.device
        self.key, self.value = make_codecs(keys, values, quantizer)
        self.dtype = self.key.dtype
        self.buckets: dict[Stage, Bucket] = {}
        self.derived: dict[str, object] = {}  # what readers of the buckets keep from call to call; see `changed`

    def changed(self) -> None:
        """Forget what was derived from the buckets: called before each change of them."""
        self.derived.clear()

    def __getstate__(self) -> dict[str, object]:
        """A copy's tensors lie elsewhere, so that it derives anew."""
        return {**self.__dict__, "derived": {}}

    def _bucket(self, stage: Stage) -> Bucket:
        return self.buckets.setdefault(stage, Bucket(stage, self.reserved))

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
        number: finite if everything that was stored is, see `Codec.magnitude`.
        """
        self.changed()
        layers, rows, heads, n = keys.shape[:4]
        index = torch.arange(n, device=keys.device)
        token = (index % block).to(torch.uint8).expand(layers, rows, heads, n)
        block_start = (first + index // block * block).to(torch.int32).expand(1, rows, 1, n)
        if isinstance(widths, tuple):
            received = None if received is None else received.half()  # sums of at most a few thousand shares
            key, value = self.key.encode(keys, widths[0]), self.value.encode(values, widths[1])
            bucket = self._bucket(Stage(*widths, pending))
            bucket.append(PackedTokens(key, value, token, block_start, received))
            if pending:
                bucket.blocks += [(first + i, min(block, n - i)) for i in range(0, n, block)]
            return self.key.magnitude(key) + self.value.magnitude(value)
        total = 0
        for bits in map(int, np.unique(widths)):
            chosen = widths == bits
            counts = chosen.sum(-1)
            most = int(counts.max())
            # Stable order by "not chosen" lists each row's chosen tokens first, in text order.
            order = np.argsort(~chosen, axis=-1, kind="stable")[:, :most]
            slots = torch.as_tensor(order, device=keys.device)[None, :, None]
            valid = torch.as_tensor(np.arange(most) < counts[:, None], device=keys.device)[None, :, None]
            key, value = self.key.encode(take(keys, slots), bits), self.value.encode(take(values, slots), bits)
            places = take(token, slots).masked_fill(~valid, EMPTY)
            tokens = PackedTokens(key, value, places, take(block_start, slots))
            self._bucket(Stage(bits, bits)).append(tokens, counts)
            total = total + (self.key.magnitude(key) + self.value.magnitude(value))
        return total

    def settle(
        self, source: Stage, target: tuple[int, int], blocks: int, keep: int, scores: Scores | None, pending: bool
    ) -> None:
        """Re-quantize the oldest `blocks` of the pending bucket `source` to `target` (key bits, value bits).

        With `keep`, each layer, row and head leaves the `keep` tokens of a block that `scores` puts highest at the
        widths they have; all are then settled.
        """
        self.changed()
        ragged = self.buckets[source].ragged
        while blocks:
            tokens, taken = self.buckets[source].pop_blocks(blocks)  # all of one size
            blocks -= len(taken)
            key, key_error = self.key.requantize(tokens.key, target[0], want_error=keep > 0)
            value, value_error = self.value.requantize(tokens.value, target[1], want_error=keep > 0)
            received = None if tokens.received is None else tokens.received.float()
            tokens = replace(tokens, received=tokens.received if pending else None)
            moved = replace(tokens, key=key, value=value)
            if keep:
                rank = scores(Demotion(taken[0][0], taken[0][1], key_error, value_error, received))
                kept, rest = _split(rank, tokens.token, taken[0][1], keep)
                self._bucket(Stage(source.key_bits, source.value_bits)).append(tokens.take(kept), ragged=ragged)
                if not rest.shape[-1]:
                    continue
                moved = moved.take(rest)
            bucket = self._bucket(Stage(*target, pending))
            bucket.append(moved, ragged=ragged)
            if pending:
                bucket.blocks += taken

    def dense(self, layer: int, length: int) -> Iterator[torch.Tensor]:
        """Keys, then values of one layer's committed tokens in text order, dequantized: `[B, H, length, D]` each."""
        held = [bucket.held(layer) for bucket in self.buckets.values() if bucket.slots]
        places = [tokens.positions().masked_fill(tokens.token == EMPTY, length) for tokens in held]
        yield _in_text_order(self.key, [tokens.key for tokens in held], places, layer, length)
        yield _in_text_order(self.value, [tokens.value for tokens in held], places, layer, length)

    def crop(self, length: int) -> None:
        """Drop the tokens at positions `length` and later."""
        self.changed()
        for bucket in self.buckets.values():
            bucket.crop(length)
        self.buckets = {stage: bucket for stage, bucket in self.buckets.items() if bucket.slots}

    def map_rows(self, index: torch.Tensor) -> None:
        """Replace the rows of the batch by the rows `index`."""
        self.changed()
        for bucket in self.buckets.values():
            bucket.map_rows(index)
        if self.key.centre is not None:
            self.key.centre = self.key.centre.index_select(1, index)

    def to(self, device: torch.device | str) -> None:
        """Move every tensor to another device."""
        self.changed()
        self.device = torch.device(device)
        for bucket in self.buckets.values():
            bucket.buffers = bucket.buffers.map(lambda x: x.to(device))
        shared = self.value.rotation is self.key.rotation
        for codec in (self.key, self.value):
            codec.rotation = None if codec.rotation is None else codec.rotation.to(device)
            codec.centre = None if codec.centre is None else codec.centre.to(device)
        if shared:
            self.value.rotation = self.key.rotation

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that this store owns, one that is shared more than once."""
        for bucket in self.buckets.values():
            yield from bucket.buffers.named().values()
        every = (self.key.rotation, self.key.centre, self.value.rotation)
        yield from (x for x in every if x is not None)


def _split(rank: torch.Tensor, token: torch.Tensor, size: int, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots of the `keep` tokens of each block of `size` that `rank` puts highest, and of the others, in order."""
    if rank.shape != token.shape:
        raise ValueError(
            f"scores must have shape {list(token.shape)} (layers, rows, heads, tokens of the blocks), "
            f"got {list(rank.shape)}"
        )
    keep = min(keep, size)
    order = rank.masked_fill(token == EMPTY, -torch.inf).unflatten(-1, (-1, size))
    order = order.argsort(dim=-1, descending=True, stable=True)
    order = order + torch.arange(0, token.shape[-1], size, device=order.device)[:, None]
    return tuple(part.sort(-1).values.flatten(-2) for part in order.split([keep, size - keep], dim=-1))


def _in_text_order(
    codec: Codec, parts: list[Codes], places: list[torch.Tensor], layer: int, length: int
) -> torch.Tensor:
    """Decoded `parts` of one layer with each vector at its place `[B, H, n]`; place `length` is thrown away."""
    result = None
    for codes, at in zip(parts, places, strict=True):
        x = codec.decode(codes, layer)
        if result is None:
            result = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
        result.scatter_(2, at[..., None].expand_as(x), x)
    return result[:, :, :length]
