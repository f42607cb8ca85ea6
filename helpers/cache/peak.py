"""`PeakBytes`: the most memory that a cache had at any moment, its temporary tensors included.

Whoever makes a tensor in the cache says so; it counts until its memory is given back, which is asked of the memory
itself. So nothing has to be said when something is dropped, and what is shared counts once.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

FORGOTTEN = 10_000  # notes beyond which those of memory that has been given back are dropped


class PeakBytes:
    """`bytes` is the largest sum of living memory among what `note` was told of, since the last `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin anew; what lives on has to be noted again."""
        self.bytes = 0
        self._noted: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = 0  # of all noted, living or not

    def note(self, *tensors: torch.Tensor) -> None:
        """Count the memory behind `tensors` from now on, for as long as it is held."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            _, before = self._noted.get(storage._cdata, (None, 0))
            self._noted[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._sum += storage.nbytes() - before
        # What has been given back is asked only where it matters: each time would cost more than the cache's own work.
        if self._sum > self.bytes or len(self._noted) > FORGOTTEN:
            self._noted = {key: noted for key, noted in self._noted.items() if not noted[0].expired()}
            self._sum = sum(size for _, size in self._noted.values())
            self.bytes = max(self.bytes, self._sum)

    def __deepcopy__(self, memo: dict) -> "PeakBytes":
        """A copy's memory lies elsewhere: it begins with nothing noted but the highest so far."""
        other = PeakBytes()
        other.bytes = self.bytes
        return other
