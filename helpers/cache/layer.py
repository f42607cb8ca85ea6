"""One layer of the cache: its full-precision tail, and what it hands to attention."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from helpers.cache.bucket import Bucket
from helpers.cache.store import PackedStore

if TYPE_CHECKING:
    from helpers.cache.kv_cache import PackedKVCache


@dataclass(slots=True)
class PackedStates:
    """What `update` hands to packed attention in place of keys and of values: one layer's tokens as stored."""

    cache: "PackedKVCache"
    store: PackedStore | None  # None while nothing is committed
    layer: int  # index of the layer inside `store`
    layer_idx: int  # index of the layer in the model
    keys: torch.Tensor  # the tail's buffers [B, H, tail tokens or more, D]
    values: torch.Tensor
    tail: int  # tokens in the tail

    @property
    def tail_keys(self) -> torch.Tensor:
        """`[B, H, tail tokens, D]`"""
        return self.keys[:, :, : self.tail]

    @property
    def tail_values(self) -> torch.Tensor:
        """`[B, H, tail tokens, D]`"""
        return self.values[:, :, : self.tail]

    @property
    def buckets(self) -> list[Bucket]:
        """Buckets that hold committed tokens."""
        return [bucket for bucket in self.store.buckets.values() if bucket.slots] if self.store else []


class PackedLayer(CacheLayerMixin):
    """One layer's full-precision tail, and its door to the store that it shares with the other layers.

    What concerns the shared store (reset, crop, reorder, repeat, select, offload) is done for all layers when it is
    asked of the first one, so that a container's loop over its layers does it once.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, cache: "PackedKVCache", layer_idx: int):
        super().__init__()
        self.cache, self.layer_idx = cache, layer_idx
        self.tail_length = 0
        self.received: torch.Tensor | None = None  # [B, H, tail tokens]: attention from later blocks of the tail

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
        cache = self.cache
        if self.layer_idx == 0:
            cache.begin_forward()
        at = self.tail_length
        end = at + key_states.shape[2]
        self._reserve(end)
        self.keys[:, :, at:end] = key_states
        self.values[:, :, at:end] = value_states
        self.tail_length = end
        states = cache.states(self.layer_idx)
        if cache.hands_out_packed:
            return states, states
        return cache.dense(states)

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
        if (held.shape[1], held.shape[3], held.dtype) != (given.shape[1], given.shape[3], given.dtype):
            raise ValueError(
                f"the cache holds {held.shape[1]} heads of {held.shape[3]} in {held.dtype}, the model sent "
                f"{given.shape[1]} heads of {given.shape[3]} in {given.dtype}: use one cache per model"
            )
        if held.device != given.device:
            raise ValueError(
                f"the cache lies on {held.device}, the model sent states on {given.device}: reset the cache after "
                "moving a model"
            )

    def _reserve(self, tokens: int) -> None:
        if tokens <= self.keys.shape[2]:
            return
        block = self.cache.block
        capacity = -(-tokens // block) * block
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty(*old.shape[:2], capacity, old.shape[3])
            new[:, :, : self.tail_length] = old[:, :, : self.tail_length]
            setattr(self, name, new)

    def drop_front(self, tokens: int) -> None:
        """Remove the oldest `tokens` tokens of the tail, giving back what a long prompt took."""
        rest = self.tail_length - tokens
        for name in ("keys", "values"):
            old = getattr(self, name)
            kept = old[:, :, tokens : self.tail_length].clone()
            if old.shape[2] > 2 * self.cache.block:
                setattr(self, name, kept)
            else:
                old[:, :, :rest] = kept
        self.tail_length = rest
        if self.received is not None:
            self.received = self.received[:, :, tokens:].clone() if rest else None

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

    def get_seq_length(self) -> int:
        return self.cache.committed + self.tail_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.keys = self.values = self.received = None
        self.is_initialized = False
        self.tail_length = 0
        if self.layer_idx == 0:
            self.cache.clear_stores()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` tokens (a non-positive count, as everywhere in transformers 5)."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a non-positive number of tokens to remove, got {tokens_to_remove}")
        if self.layer_idx == 0 and self.is_initialized:
            self.cache.crop_all(-tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        if self.layer_idx == 0 and self.is_initialized:
            if self.cache.rows_note:
                raise ValueError(f"the rows of this cache cannot be reordered{self.cache.rows_note}")
            self.cache.map_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.layer_idx == 0 and self.is_initialized:
            self.cache.map_rows(torch.arange(self.keys.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if self.layer_idx == 0 and self.is_initialized:
            if indices.dtype == torch.bool:
                indices = indices.nonzero()[:, 0]
            self.cache.map_rows(indices)

    def _move(self, device: torch.device | str) -> None:
        if not self.is_initialized:
            return
        self.keys, self.values = self.keys.to(device), self.values.to(device)
        self.received = None if self.received is None else self.received.to(device)
        if self.layer_idx == 0:
            for store in self.cache.stores:
                store.to(device if device == "cpu" else self.cache.layers[store.layers[0]].device)

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)
            if self.layer_idx != 0:
                self.cache.layers[0].prefetch()

    def tail(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the tail, `[B, H, tail tokens, D]` each."""
        return self.keys[:, :, : self.tail_length], self.values[:, :, : self.tail_length]
