"""Peak bytes of a cache of any kind, by tracing every tensor that it makes.

    with trace_cache(cache) as trace:
        model.generate(**inputs, cache=cache)
    trace.peak_bytes

What counts is what the cache owns, what it makes while it works and what it hands to attention, each for as long as
its memory is held. What one operation of PyTorch uses inside is not seen, for no cache. Slow: for bytes, not for times.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.cache_utils import Cache

from helpers.cache import PackedKVCache, rotation_matrix
from helpers.cache.arguments import head_dim
from helpers.cache.peak import PeakBytes

WORK = ("update", "commit", "commit_ready", "settle", "crop", "end_forward", "map_rows")  # methods that make tensors


class CacheTrace(TorchDispatchMode):
    """While entered, notes the memory behind the output of every operation."""

    def __init__(self):
        super().__init__()
        self.peak = PeakBytes()
        self.of_the_model: set[int] = set()  # memory that caches share and do not own, which does not count

    @property
    def peak_bytes(self) -> int:
        """The largest sum of memory that was held at one moment."""
        return self.peak.bytes

    def note(self, thing: object) -> None:
        """Count the tensors inside `thing`, of which some may be of kinds that wrap others."""
        for leaf in tree_leaves(thing):
            if hasattr(leaf, "__tensor_flatten__"):
                self.note([getattr(leaf, name) for name in leaf.__tensor_flatten__()[0]])
            elif isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.of_the_model:
                self.peak.note(leaf)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        self.note(output)
        return output


@contextmanager
def trace_cache(cache: Cache) -> Iterator[CacheTrace]:
    """Trace an empty cache while the block runs: everything that its methods make or return."""
    trace, own = CacheTrace(), isinstance(cache, PackedKVCache)
    if own:  # made once a process, for all caches
        rotation_matrix(head_dim(cache.config))
        if cache.coding.balance is not None:
            shared = cache.coding.balance.turns(range(len(cache.packed)), "cpu", torch.float32)
            trace.of_the_model = {x.untyped_storage()._cdata for x in shared}

    def traced(method):
        def call(*args, **kwargs):
            with trace:
                result = method(*args, **kwargs)
            trace.note(result)
            return result

        return call

    def received(layer, method):
        def call(sums):
            trace.note(sums)  # made by attention
            with trace:
                method(sums)

        layer.add_received = call

    for name in WORK if own else ("update",):
        setattr(cache, name, traced(getattr(cache, name)))
    for layer in cache.packed if own else ():
        received(layer, layer.add_received)
    try:
        yield trace
    finally:
        for name in WORK if own else ("update",):
            delattr(cache, name)
        for layer in cache.packed if own else ():
            del layer.add_received
