"""Signals: how unsure the small model is of the next token, as numbers that a gate compares with its threshold.

Entropy is in bits here, while the features and rules of `helpers.policies` count in nats (1 nat = 1.44 bits). Two
controls are members of the same family: `random`, and the *oracle*, which knows what the large model would choose.
Knows nothing of gates or generation.
"""

import math
import random
import zlib
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from helpers.policies.features import entropy_of, log_probabilities


class Signal:
    """How unsure a model is; higher means less sure. A signal of one's own overrides `of`, or `value`."""

    name = ""
    needs_large = False  # reads the large model's prediction of every token, so that a gate by it saves nothing
    needs_hidden = False  # reads the small model's last hidden state, and the tokens that it has read
    uniform = False  # uniform in 0-1 whatever the text: its percentiles are known without reading any

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """The signal of next-token distributions `[..., vocabulary]`: `[...]`, in float32 at least."""
        raise ValueError(f"signal {self.name!r} cannot be read from the small model's logits alone")

    def of_text(self, logits: torch.Tensor, hidden: torch.Tensor | None, ids: list[int]) -> torch.Tensor:
        """The signal after every token `ids` of a text `[tokens]`, from logits `[tokens, vocabulary]`.

        `hidden` are the hidden states `[tokens, hidden]` for a signal that `needs_hidden`.
        """
        return self.of(logits)

    @property
    def identity(self) -> str:
        """What tells its values from those of others."""
        return self.name

    def value(
        self, small: torch.Tensor, large: torch.Tensor | None = None, draw: Callable[[], float] | None = None
    ) -> float:
        """The signal of one token, from the logits `[vocabulary]` of both models (`large` only if needed).

        `draw` is a stream of random numbers in 0-1. A signal that `needs_hidden` gets the hidden state `[hidden]` and
        the tokens read as further arguments. NaN where logits are NaN or infinite.
        """
        return float(self.of(small))

    def check_pair(self, small: PreTrainedModel, large: PreTrainedModel) -> None:
        """Raise `ValueError` where the signal does not fit two models."""

    def __repr__(self) -> str:
        return repr(self.name)


def _probabilities(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


class Entropy(Signal):
    """Entropy of the next-token distribution in bits (`TokenFeatures.entropy`, which the rule reads, is in nats)."""

    name = "entropy"

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        return entropy_of(log_probabilities(logits)) / math.log(2)

    def value(self, small, large=None, draw=None) -> float:
        # The fewest operations: right after a forward each takes several times as long as alone, since the
        # processor's caches are full of weights.
        log_p = small.log_softmax(-1, dtype=torch.promote_types(small.dtype, torch.float32))
        bits = float(log_p.exp().dot(log_p)) / -math.log(2)
        return float(self.of(small)) if math.isnan(bits) else bits  # 0 * -inf, where a token is ruled out


class MaxProb(Signal):
    """1 - the largest probability."""

    name = "max_prob"

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        return 1 - _probabilities(logits).amax(-1)


class Margin(Signal):
    """1 - (the largest probability - the second)."""

    name = "margin"

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        best = _probabilities(logits).topk(2, dim=-1).values
        return 1 - (best[..., 0] - best[..., 1])


class RandomControl(Signal):
    """Drawn, whatever the text: what any signal must beat."""

    name = "random"
    uniform = True

    def value(self, small, large=None, draw=None) -> float:
        return draw()


class Oracle(Signal):
    """By how many bits the large model prefers its own choice to the small one's; 0 where they choose alike."""

    name = "oracle"
    needs_large = True

    def value(self, small, large=None, draw=None) -> float:
        token = int(small.argmax(-1))
        large = large.to(torch.promote_types(large.dtype, torch.float32))
        if int(large.argmax(-1)) == token:
            return 0.0
        # Of two choices that are equally probable one is taken: that is a difference, however small.
        return max(float(large.max() - large[token]) / math.log(2), 1e-9)


SIGNALS = {signal.name: signal for signal in (Entropy(), MaxProb(), Margin(), RandomControl(), Oracle())}


def find_signal(signal: str | Signal) -> Signal:
    """The signal of that name (a signal itself stays). Raises `ValueError` for names that are not in `SIGNALS`."""
    if isinstance(signal, Signal):
        return signal
    if signal == "learned":
        raise ValueError('signal "learned" belongs to a pair of models: give LearnedSignal.load(folder, small, large)')
    if signal not in SIGNALS:
        raise ValueError(f"signal must be one of {', '.join(SIGNALS)}, got {signal!r}")
    return SIGNALS[signal]


def random_stream(seed: int, prompt: list[int]) -> Callable[[], float]:
    """Random numbers in 0-1 that depend on the seed and the prompt, not on what was written before."""
    return random.Random(f"{seed} {zlib.crc32(str(prompt).encode())}").random
