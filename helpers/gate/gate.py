"""`EntropyGate`: the decision, token by token, whether the large model is to write; and a gate that steers itself."""

import math
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.calibration import percentile_threshold
from helpers.gate.signals import Signal, find_signal


@dataclass
class EntropyGate:
    """Fires where `signal` is above `threshold`: there the large model writes.

    `signal` is the name of one of `SIGNALS`, or a `Signal`: "entropy" (bits), "max_prob" and "margin" of the small
    model; a `LearnedSignal` of the pair; "random", the control, which draws from `seed`; "oracle", the ideal, which
    asks the large model at every step and saves nothing: with threshold 0 it fires where the two models' choices
    differ. A threshold of -inf fires always, of inf never.

    With a `rollback` (bits), the large model judges the small one's tokens as it catches up on them, which costs
    nothing: the first to which it gives a surprisal of more than that is taken back, with all after it, and it writes
    its own instead (BiLD, arXiv 2302.07863).

    Raises `ValueError` for unknown signals, NaN, a negative rollback, and a rollback of the oracle, which never
    leaves a token unread.
    """

    threshold: float
    signal: str | Signal = "entropy"  # a `Signal` once the gate is made
    rollback: float | None = None
    seed: int = 0

    def __post_init__(self):
        self.signal = find_signal(self.signal)
        if math.isnan(self.threshold):
            raise ValueError("threshold must be a number, got NaN")
        if self.rollback is not None and not self.rollback >= 0:
            raise ValueError(f"rollback must be a number of bits, 0 or more, got {self.rollback}")
        if self.rollback is not None and self.signal.needs_large:
            raise ValueError(
                f"rollback has nothing to take back where signal is {self.signal}: the large model reads all"
            )

    def fires(self, value: float) -> bool:
        """Whether the large model is to write the token for which the signal has this value."""
        return value > self.threshold

    @classmethod
    def calibrate(
        cls,
        small: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        texts: list[str],
        percentile: float = 50,
        signal: str | Signal = "entropy",
        target_usage: float | None = None,
        rollback: float | None = None,
        **reading,
    ) -> "EntropyGate":
        """A gate at a percentile of the small model's signal over all tokens of `texts`.

        Percentile p fires on the most uncertain (100 - p)% of the tokens of such text; `target_usage` u stands for
        the percentile 100 (1 - u). 0 fires always and 100 never, whatever the text. The "random" signal needs no
        text. `reading`: `max_tokens`, `cache_dir` and `progress` of `percentile_threshold`.

        Raises `ValueError` for a percentile outside 0-100, for no or only empty texts, and for the oracle, whose
        threshold is no percentile of text.
        """
        if target_usage is not None:
            percentile = 100 * (1 - check_usage(target_usage))
        threshold = percentile_threshold(small, tokenizer, texts, percentile, signal, **reading)
        return cls(threshold, signal, rollback)


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
        check_usage(self.target, "target")
        if not 0 < self.step < math.inf:
            raise ValueError(f"step must be a positive number, got {self.step}")

    @classmethod
    def follow(cls, gate: EntropyGate, target: float, step: float = 0.1) -> "OnlineTracker":
        """A tracker that starts from a calibrated gate."""
        return cls(gate.threshold, gate.signal, gate.rollback, gate.seed, target, step)

    def fires(self, value: float) -> bool:
        fired = super().fires(value)
        self.threshold += self.step * (fired - self.target)
        return fired


def check_usage(usage: float, name: str = "target_usage") -> float:
    """`usage` itself; `ValueError` where it is no share of tokens, 0 to 1."""
    if not 0 <= usage <= 1:
        raise ValueError(f"{name} must be a share between 0 and 1, got {usage}")
    return usage
