"""`PeakBytes`: the most memory that a cache had at any moment, its temporary tensors included.

Whoever makes a tensor in the cache says so; it counts until its memory is given back, which is asked of the memory
itself. So nothing has to be said when something is dropped, and what is shared counts once.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

MANY = 512  # pieces of memory, noted before it is asked which are gone


class PeakBytes:
    """`bytes` is the largest sum of living memory among what `note` was told of, since the last `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin anew; what lives on has to be noted again."""
        self.bytes = 0
        self._known: dict[int, tuple[StorageWeakRef, int]] = {}  # what was noted and may have gone since
        self._sum, self._many = 0, MANY  # bytes of `_known`; how long it may get

    def note(self, *tensors: torch.Tensor) -> None:
        """Count the memory behind `tensors` from now on, for as long as it is held."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            _, before = self._known.get(storage._cdata, (None, 0))
            self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._sum += storage.nbytes() - before
        # What has gone matters only where the sum with it would be a new peak.
        if self._sum > self.bytes or len(self._known) > self._many:
            gone = torch.UntypedStorage._expired  # at once: `StorageWeakRef.expired` takes three calls to ask
            self._known = {key: held for key, held in self._known.items() if not gone(held[0].cdata)}
            self._sum, self._many = sum(size for _, size in self._known.values()), 2 * len(self._known) + MANY
            self.bytes = max(self.bytes, self._sum)

    def __deepcopy__(self, memo: dict) -> "PeakBytes":
        """A copy's memory lies elsewhere: it begins with nothing noted but the highest so far."""
        other = PeakBytes()
        other.bytes = self.bytes
        return other
