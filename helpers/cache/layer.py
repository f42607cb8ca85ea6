"""One layer of the cache: its full-precision tail, and what it hands to attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from helpers.cache.bucket import Segment, Stage
from helpers.cache.layout import Layout
from helpers.cache.store import PackedStore

if TYPE_CHECKING:
    from helpers.cache.kv_cache import PackedKVCache


@dataclass(slots=True)
class PackedStates:
    """What `update` hands to packed attention in place of keys and of values: one layer's tokens as stored."""

    cache: "PackedKVCache"
    store: PackedStore | None  # None while nothing is committed
    layout: Layout | None  # which of the store's tokens this layer sees
    layer: int  # index of the layer inside `store`
    layer_idx: int  # index of the layer among the packed ones
    keys: torch.Tensor  # the tail's buffers [B, H, tail tokens or more, D]
    values: torch.Tensor
    tail: int  # tokens in the tail

    def __getattr__(self, name: str):
        raise AttributeError(
            f"packed keys and values have no {name!r}: this model computes attention by itself; load it anew and use "
            "the cache without use_packed_attention"
        )

    @property
    def tail_keys(self) -> torch.Tensor:
        """`[B, H, tail tokens, D]`"""
        return self.keys[:, :, : self.tail]

    @property
    def tail_values(self) -> torch.Tensor:
        """`[B, H, tail tokens, D]`"""
        return self.values[:, :, : self.tail]

    @property
    def segments(self) -> list[tuple[Stage, Segment]]:
        """Segments that hold packed tokens, each with its stage."""
        return self.layout.segments() if self.layout else []

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in text order, dequantized, `[B, H, tokens, D]` each, in the model's dtype."""
        tails = self.tail_keys, self.tail_values
        if self.store is None:
            return tails
        packed = self.store.dense(self.layer, self.cache.packed[self.layer_idx].packed_length)
        states = []
        for tail in tails:  # nothing may hold on to one side's packed tokens while the other's are read
            states.append(torch.cat([next(packed).to(tail.dtype), tail], dim=2))
            self.cache.peak.note(states[-1])
        return tuple(states)


@dataclass
class UnreadStates:
    """What `update` hands to packed attention while `torch.compile` traces: states that no layer has taken yet.

    The operator of `attention.compiled` takes them and attends in one call that is opaque to the compiler.
    """

    key: torch.Tensor  # [B, H, n, D], as the model sent them
    value: torch.Tensor
    handle: torch.Tensor  # the cache's, by which it is found when the compiled code runs
    layer_idx: int  # index of the layer in the model


class PackedLayer(CacheLayerMixin):
    """One layer's full-precision tail: `keys` and `values` `[B, H, tail_length or more, D]`.

    Committed tokens lie in a store that layers share; what concerns both is done by `PackedKVCache`.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: "PackedKVCache", layer_idx: int):
        super().__init__()
        self.cache, self.layer_idx = cache, layer_idx
        self.tail_length = self.packed_length = 0  # tokens
        self.received: torch.Tensor | None = None  # [B, H, tail tokens]: attention from later blocks of the tail

    def states(self) -> tuple[torch.Tensor, ...]:
        """The buffers of keys and of values, none before the first tokens."""
        return (self.keys, self.values) if self.is_initialized else ()

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (x.new_zeros(*x.shape[:2], 0, x.shape[-1]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Append `[B, H, n, D]` to the tail and return all states: packed if packed attention reads them, else dense.

        Raises `ValueError` where batch, heads, head_dim or dtype differ from what the cache holds.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.keys.device != key_states.device:
            self.prefetch()
        self._check(self.keys, key_states)
        self._check(self.values, value_states)
        self.cache.before_update(self.layer_idx, key_states.shape[2])
        at, end = self.tail_length, self.tail_length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._rebuild(0, -(-end // self.cache.block) * self.cache.block)
        self.keys[:, :, at:end] = key_states
        self.values[:, :, at:end] = value_states
        self.tail_length = end
        states = self.cache.states(self.layer_idx)
        return (states, states) if self.cache.hands_out_packed else states.dense()

    def _check(self, held: torch.Tensor, given: torch.Tensor) -> None:
        rows, heads, _, dim = held.shape
        alike = given.shape == (rows, heads, given.shape[2], dim) and held.dtype is given.dtype
        if alike and held.device == given.device:
            return
        if held.shape[0] != given.shape[0]:
            raise ValueError(
                f"the cache holds {held.shape[0]} sequence(s), the model sent {given.shape[0]}: reset it before "
                f"another batch, or repeat its rows first for beams{self.cache.rows_note}"
            )
        if alike:
            raise ValueError(
                f"the cache lies on {held.device}, the model sent states on {given.device}: reset the cache after "
                "moving a model"
            )
        raise ValueError(
            f"the cache holds {held.shape[1]} heads of {held.shape[3]} in {held.dtype}, the model sent "
            f"{given.shape[1]} heads of {given.shape[3]} in {given.dtype}: use one cache per model"
        )

    def _rebuild(self, start: int, capacity: int) -> None:
        """Move the tail's tokens from `start` on to the front of new buffers for `capacity` tokens."""
        kept = self.tail_length - start
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, :kept] = old[:, :, start : self.tail_length]
            setattr(self, name, new)
            self.cache.peak.note(new)
        self.tail_length = kept

    def drop_front(self, tokens: int) -> None:
        """Remove the oldest `tokens` tokens of the tail, which were packed, giving back what a long prompt took."""
        kept, block = self.tail_length - tokens, self.cache.block
        if self.keys.shape[2] > block:
            self._rebuild(tokens, max(block, -(-kept // block) * block))
        elif kept:
            for states in (self.keys, self.values):
                states[:, :, :kept] = states[:, :, tokens : self.tail_length].clone()
        self.tail_length = kept
        self.packed_length += tokens
        if self.received is not None:
            self.received = self.received[:, :, tokens:].clone() if self.tail_length else None

    def shorten(self, tokens: int) -> None:
        """Keep the oldest `tokens` tokens."""
        self.packed_length = min(self.packed_length, tokens)
        self.tail_length = tokens - self.packed_length
        self.received = None if self.received is None else self.received[:, :, : self.tail_length].clone()

    @property
    def kind(self) -> tuple:
        """What layers must have in common to lie in one store."""
        return self.device, self.keys.shape[1], self.keys.shape[3], self.values.shape[3]

    def tail_received(self, tokens: int) -> torch.Tensor:
        """Attention received by the oldest `tokens` tokens of the tail, float32 `[B, H, tokens]`."""
        result = self.keys.new_zeros(*self.keys.shape[:2], tokens, dtype=torch.float32)
        if self.received is not None:
            held = self.received[:, :, :tokens]
            result[:, :, : held.shape[2]] = held
        return result

    def add_received(self, received: torch.Tensor) -> None:
        """Add to what the tail's tokens have received, `[B, H, tail tokens]`."""
        self.received = received.float() + self.tail_received(self.tail_length)
        self.cache.peak.note(received, self.received)

    def get_seq_length(self) -> int:
        return self.packed_length + self.tail_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.received = None
        self.is_initialized = False
        self.tail_length = self.packed_length = 0

    def _map(self, change) -> None:
        self.keys, self.values = change(self.keys), change(self.values)
        self.received = None if self.received is None else change(self.received)
        self.cache.peak.note(*(x for x in (self.keys, self.values, self.received) if x is not None))

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Replace the rows of the tail by the rows `beam_idx`."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def _move(self, device: torch.device | str) -> None:
        """Move the tail and the store behind it, which other layers may share: each brings it back for itself."""
        self._map(lambda x: x.to(device))
        store, _ = self.cache.store_of.get(self.layer_idx, (None, 0))
        if store is not None and store.device != torch.device(device):
            store.to(device)

    def offload(self) -> None:
        if self.is_initialized:
            self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)
