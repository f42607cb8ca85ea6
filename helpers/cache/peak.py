"""`PeakBytes`: the most memory that a cache had at any moment, its temporary tensors included.

Whoever makes a tensor in the cache says so; it counts until its memory is given back, which is asked of the memory
itself. So nothing has to be said when something is dropped, and what is shared counts once.
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef


class PeakBytes:
    """`bytes` is the largest sum of living memory among what `note` was told of, since the last `reset`."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        """Begin anew; what lives on has to be noted again."""
        self.bytes = self._noted = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, *tensors: torch.Tensor) -> None:
        """Count the memory behind `tensors` from now on, for as long as it is held."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            _, before = self._living.pop(storage._cdata, (None, 0))
            self._living[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            self._noted += storage.nbytes() - before
        # Who still lives is asked only where it can matter: if all that was noted did, would this be the most?
        if self._noted > self.bytes or len(self._living) > 10_000:
            self._living = {key: held for key, held in self._living.items() if not held[0].expired()}
            self._noted = sum(size for _, size in self._living.values())
            self.bytes = max(self.bytes, self._noted)

    def __deepcopy__(self, memo: dict) -> "PeakBytes":
        """A copy's memory lies elsewhere: it begins with nothing noted but the highest so far."""
        other = PeakBytes()
        other.bytes = self.bytes
        return other
