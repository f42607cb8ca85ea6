"""`EntropyGate`: fires where the small model is unsure."""

import math
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.signals import SIGNALS


@dataclass
class EntropyGate:
    """Fires where `signal` is above `threshold`: there the large model writes.

    Signals: "entropy" (bits), "max_prob" and "margin" of the small model (see `uncertainty`); "random", uniform in
    0-1 whatever the text, the control; "oracle", by how many bits the large model prefers its own choice to the
    small one's, which needs both models at every step and saves nothing: with threshold 0 it fires where their
    choices differ. A threshold of -inf fires always, of inf never.

    With `rollback` (bits), the large model judges the tokens that it catches up on, which costs nothing: the first
    token that it would have to pay more than that for is taken back, with all after it, and it writes its own
    instead (BiLD, arXiv 2302.07863).

    Raises `ValueError` for unknown signals, NaN, a negative rollback, and a rollback of the oracle, which never
    leaves a token unread.
    """

    threshold: float
    signal: str = "entropy"
    rollback: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.signal not in SIGNALS:
            raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {self.signal!r}")
        if math.isnan(self.threshold):
            raise ValueError("threshold must be a number, got NaN")
        if self.rollback is not None and not self.rollback >= 0:
            raise ValueError(f"rollback must be a number of bits, 0 or more, got {self.rollback}")
        if self.rollback is not None and self.signal == "oracle":
            raise ValueError("rollback has nothing to take back where signal is 'oracle': the large model reads all")

    def fires(self, value: float) -> bool:
        """Whether the large model is to write the token for which the signal has this value."""
        return value > self.threshold

    @staticmethod
    def calibrate(small: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], **settings):
        """A gate whose threshold is a percentile of the signal on texts: see `calibration.calibrate`."""
        from helpers.gate.calibration import calibrate

        return calibrate(small, tokenizer, texts, **settings)


@dataclass
class OnlineTracker(EntropyGate):
    """A gate that moves its threshold after every decision, so that a share `target` of them fires in the long run.

    `tau += step * (fired - target)`, in units of the signal. Give the same tracker to one generation after another:
    50 tokens are too few to reach a target.
    """

    target: float = 0.2
    step: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.target <= 1:
            raise ValueError(f"target must be a share between 0 and 1, got {self.target}")
        if not 0 < self.step < math.inf:
            raise ValueError(f"step must be a positive number, got {self.step}")

    @classmethod
    def follow(cls, gate: EntropyGate, target: float, step: float = 0.1) -> "OnlineTracker":
        """A tracker that starts from a calibrated gate."""
        return cls(gate.threshold, gate.signal, gate.rollback, gate.seed, target, step)

    def fires(self, value: float) -> bool:
        fired = value > self.threshold
        self.threshold += self.step * (fired - self.target)
        return fired


def draws(gate: EntropyGate, prompt: list[int]) -> Callable[[], float]:
    """The random signal: its draws depend on the gate's seed and on the prompt, not on what was written before."""
    return random.Random(f"{gate.seed} {zlib.crc32(str(prompt).encode())}").random
