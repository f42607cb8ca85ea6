"""What caches take up: bytes owned, bytes in use, and the widths of what is stored.

`Accounting` is the part of `PackedKVCache` that counts; the functions count caches of any kind, the library's too.
"""

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, QuantizedCache

from helpers.cache.bucket import Segment, Stage
from helpers.cache.layer import PackedLayer
from helpers.cache.quantization import FULL_WIDTH
from helpers.cache.store import PackedStore
from helpers.cache.tokens import EMPTY


class Accounting:
    """Counts what the layers (of `packed` ones: tails) and the `stores` (committed tokens) of a cache take up."""

    kinds: list[str]
    packed: list[PackedLayer]
    other_layers: list[CacheLayerMixin]
    stores: list[PackedStore]

    def tensors(self) -> Iterator[torch.Tensor]:
        """Every tensor that the cache owns, spare capacity included; one that is shared may come more than once."""
        for store in self.stores:
            yield from store.tensors()
        for layer in self.packed:
            yield from layer.states()
        for layer in self.other_layers:
            yield from tensors_of(layer)
        recorded = (layer.received for layer in self.packed)
        yield from (x for x in (*recorded, self.visible, self.attention_variance) if x is not None)
        yield from (total for total, *_ in self.checks.waiting)

    def stored_bytes(self) -> int:
        """Bytes of every tensor the cache owns: codes, scales, tail, centring, bookkeeping, spare capacity."""
        if self.is_whole:
            self.end_forward()
        return memory_of(self.tensors())

    def live_bytes(self) -> int:
        """`stored_bytes` without spare capacity: what the tokens now in the cache need, all metadata included."""
        spare = sum(x[:, :, layer.tail_length :].nbytes for layer in self.packed for x in layer.states())
        for _, segment in self._segments():
            unused = segment.capacity - segment.slots
            spare += sum(x.nbytes // segment.capacity * unused for x in segment.buffers.named().values())
        return self.stored_bytes() - spare

    def peak_bytes(self) -> int:
        """The most memory that the cache had at any moment since the last reset, temporary tensors included.

        Counted are the tensors that it owns, what it makes while it works, and what it hands to attention.
        """
        self.peak.note(*self.tensors())
        return self.peak.bytes

    def _segments(self) -> list[tuple[Stage, Segment]]:
        return [pair for store in self.stores for pair in store.layout.segments()]

    def bits_per_element(self) -> float:
        """Live bits per number of the packed layers, scales, bookkeeping and tail included; 16 would be plain half
        precision."""
        a_token = sum(x.shape[0] * x.shape[1] * x.shape[3] for layer in self.packed for x in layer.states())
        elements = a_token * self.get_seq_length()
        others = memory_of(x for layer in self.other_layers for x in tensors_of(layer))
        return 8 * (self.live_bytes() - others) / elements if elements else 0.0

    def bytes_by_kind(self) -> dict[str, int]:
        """`stored_bytes` of each kind of layer, by the library's word for it; together they are all."""
        total, result = self.stored_bytes(), {}
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            if layer in self.other_layers:
                result[kind] = result.get(kind, 0) + memory_of(tensors_of(layer))
        return {"full_attention": total - sum(result.values()), **result}

    def code_bits(self) -> float:
        """Average width of the stored codes, tail counted at 16, scales and bookkeeping left out."""
        return float(self._token_bits().mean()) if self.get_seq_length() else 0.0

    def token_bits(self) -> torch.Tensor:
        """Width at which each token is stored now, averaged over layers, heads and sides; 16 in the tail.

        float32 `[B, tokens]`, on the CPU.
        """
        return self._token_bits().float()

    def _token_bits(self) -> torch.Tensor:
        self.end_forward()
        rows, heads = self.packed[0].keys.shape[0], sum(layer.keys.shape[1] for layer in self.packed)
        packed = self.packed[0].packed_length
        total = torch.zeros(rows, packed + 1, dtype=torch.float64)  # the last takes what empty slots hold
        for stage, segment in self._segments():
            held = segment.used()
            at = held.positions().masked_fill(held.token == EMPTY, packed).transpose(0, 1).flatten(1).cpu()
            bits = (stage.key_bits + stage.value_bits) / 2
            total.scatter_add_(1, at, torch.full(at.shape, bits, dtype=torch.float64))
        tail = total.new_full((rows, self.packed[0].tail_length), FULL_WIDTH)
        return torch.cat([total[:, :-1] / heads, tail], dim=1)


def memory_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the memory behind tensors, what they share counted once."""
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def stored_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache of any kind holds."""
    if isinstance(cache, Accounting):
        return cache.stored_bytes()
    tensors = {id(t): t for layer in cache.layers for t in tensors_of(layer)}
    return sum(t.nbytes for t in tensors.values())


def live_bytes(cache: Cache) -> int:
    """`stored_bytes` less spare capacity, which only the packed cache has."""
    return cache.live_bytes() if isinstance(cache, Accounting) else stored_bytes(cache)


def code_bits(cache: Cache) -> float:
    """Average width of the stored codes, full-precision tokens counted at 16; NaN where the cache does not tell."""
    if isinstance(cache, Accounting):
        return cache.code_bits()
    return 16.0 if isinstance(cache, DynamicCache) and not isinstance(cache, QuantizedCache) else float("nan")


def tensors_of(layer: CacheLayerMixin) -> Iterator[torch.Tensor]:
    """Every tensor that a layer of the library holds."""
    for value in vars(layer).values():
        yield from _tensors(value)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The plain tensors inside tensors of special kinds, tuples, lists, dictionaries and dataclasses."""
    if is_dataclass(value):
        value = vars(value)
    if hasattr(value, "__tensor_flatten__"):
        value = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)
