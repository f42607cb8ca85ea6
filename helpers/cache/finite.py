"""`FiniteChecks`: numbers that must be finite, found out with as few reads from the device as there are blocks.

Reading from a GPU makes the host wait. What is to be checked is therefore collected and read together with the widths
of a block, or at the end of a commit that reads none.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class FiniteChecks:
    """Sums that are still to be read, each with what to say if it is NaN and if it is infinite."""

    waiting: list[tuple[torch.Tensor, str, str]] = field(default_factory=list)

    def expect(self, total: torch.Tensor, if_nan: str, if_infinite: str) -> None:
        """Raise `ValueError` with one of the messages unless the number `total` is finite: on the CPU at once."""
        self.waiting.append((total, if_nan, if_infinite))
        if total.device.type == "cpu":
            self.read()

    def read(self, bits: torch.Tensor | None = None) -> np.ndarray | None:
        """The one read of a block: the widths `bits`, and everything that waits to be checked."""
        waiting, self.waiting = self.waiting, []
        if not waiting:
            return None if bits is None else bits.cpu().numpy()
        device = waiting[0][0].device
        parts = [total.detach().reshape(1).to(device, torch.float32) for total, *_ in waiting]
        if bits is not None:
            parts.append(bits.reshape(-1).to(device, torch.float32))
        numbers = torch.cat(parts).cpu().numpy()
        for total, (_, if_nan, if_infinite) in zip(numbers, waiting):
            if not math.isfinite(total):
                raise ValueError(if_nan if math.isnan(total) else if_infinite)
        return None if bits is None else numbers[len(waiting) :].reshape(bits.shape)
