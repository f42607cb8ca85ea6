"""Entropy-gated generation: a small model writes, and where it is unsure a large model writes that token.

    gate = EntropyGate.calibrate(small, tokenizer, texts, percentile=80)
    result = gated_generate(small, large, tokenizer, "Once upon a time", gate)
    result.text, result.usage, result.authors

Both models keep caches. The large one is idle until the gate fires; then it reads all tokens that it has not seen in
one forward and writes the next one. With usage p and cost ratio c (small to large, per token) no gate can be faster
than `1 / (c + p)` times the large model. Here are the gate and its generation loop; how a threshold is found
is in `calibration.py`, what to compare with in `gate_baselines.py`. One text at a time.
"""

import math
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate_reader import (
    LARGE,
    SMALL,
    CacheFactory,
    Chooser,
    Generated,
    Outlet,
    Reader,
    Streamer,
    check_context,
    check_same_tokens,
    end_tokens,
    prompt_ids,
)
from helpers.generation import synchronise

SIGNALS = ("entropy", "max_prob", "margin", "random", "oracle")


def uncertainty(logits: torch.Tensor, signal: str = "entropy") -> torch.Tensor:
    """How unsure a next-token distribution is: `[..., vocabulary]` to `[...]`, in float32 at least; higher: less sure.

    "entropy" in bits; "max_prob" is 1 - the largest probability; "margin" is 1 - (the largest - the second).

    >>> uncertainty(torch.zeros(4)).item()  # uniform over 4: two bits
    2.0
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    p = logits.softmax(-1, dtype=dtype)
    if signal == "entropy":
        return torch.special.entr(p).sum(-1) / math.log(2)
    if signal == "max_prob":
        return 1 - p.amax(-1)
    if signal == "margin":
        best = p.topk(2, dim=-1).values
        return 1 - (best[..., 0] - best[..., 1])
    raise ValueError(f"signal must be one of entropy, max_prob, margin to be read from logits, got {signal!r}")


def entropy_bits(logits: torch.Tensor) -> float:
    """`uncertainty(logits)` of one distribution `[vocabulary]`, in the fewest operations.

    Right after a model's forward each operation takes several times as long as alone, since the processor's caches
    are full of weights.
    """
    log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    bits = float(log_p.exp().dot(log_p)) / -math.log(2)
    return float(uncertainty(logits)) if math.isnan(bits) else bits  # 0 * -inf, where a token is ruled out


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
        from helpers.calibration import calibrate

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


def trace(result: Generated, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """One row a token of a gated text: `step`, `token_id`, `token` (text), `signal`, `fired` and `author`.

    A token that a rollback put in has the large model as author although the gate had not fired: `fired` is by
    author, `signal` what the small model said.
    """
    return pd.DataFrame(
        {
            "step": range(len(result.token_ids)),
            "token_id": result.token_ids,
            "token": [tokenizer.decode([token]) for token in result.token_ids],
            "signal": result.signal,
            "fired": [author == LARGE for author in result.authors],
            "author": result.authors,
        }
    )


def check_signal(value: float, written: int) -> None:
    """Raise `ValueError` where the signal of the token after `written` ones is NaN: its logits were no numbers."""
    if math.isnan(value):
        raise ValueError(
            f"logits hold NaN or infinity after {written} written token(s), so that there is no entropy to gate by: "
            "run the models in float32 or bfloat16, or look for the first layer whose output is not finite"
        )


def draws(gate: EntropyGate, prompt: list[int]) -> Callable[[], float]:
    """The random signal: its draws depend on the gate's seed and on the prompt, not on what was written before."""
    return random.Random(f"{gate.seed} {zlib.crc32(str(prompt).encode())}").random


def gated_generate(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    gate: EntropyGate,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    small_cache: CacheFactory | None = None,
    large_cache: CacheFactory | None = None,
    streamer: Streamer | None = None,
    stop_at_end: bool = True,
) -> Generated:
    """Go on from `prompt`: the small model writes, the large one where the gate fires.

    Greedy, or sampled with a `temperature` and a `seed`. Each model gets the prompt in the chat template of its own
    tokenizer, where that has one; `tokenizer` is the small model's, and the large one's too unless `large_tokenizer`
    is given. Ends with the end-of-text token of either model, which is kept in `token_ids`, or after
    `max_new_tokens`; with `stop_at_end=False` only there. A cache factory takes the model and returns an empty cache
    or a `PolicyDriver` around one; the default is `DynamicCache`. The streamer gets the small model's prompt, then
    each token once it cannot be taken back any more.

    Raises `ValueError` for tokenizers that differ, an empty prompt, and one that does not fit into a context.
    """
    large_tokenizer = large_tokenizer or tokenizer
    check_same_tokens(tokenizer, large_tokenizer)
    choose = Chooser(temperature, seed)
    writer = Reader.start(small, prompt_ids(tokenizer, prompt), small_cache)
    helper = Reader.start(large, prompt_ids(large_tokenizer, prompt), large_cache)
    check_context(small, SMALL, len(writer.prompt), max_new_tokens)
    check_context(large, LARGE, len(helper.prompt), max_new_tokens)
    ends = end_tokens(small, large) if stop_at_end else set()
    draw = draws(gate, writer.prompt) if gate.signal == "random" else None
    keeps_predictions = gate.rollback is not None and writer.driver and "surprisal" in writer.driver.wanted
    predictions: list[torch.Tensor] = []  # of the small model, one a step, where a rollback may need them
    result = Generated("", [], [], [], 0.0, 0.0)
    written, authors = result.token_ids, result.authors

    synchronise(small.device)
    started = time.perf_counter()
    outlet = Outlet(streamer, writer.prompt)
    # Faster than no_grad, but what a packed cache keeps for later texts must not be born in it.
    with torch.inference_mode(small_cache is None and large_cache is None), torch.no_grad():
        while len(written) < max_new_tokens and not (written and written[-1] in ends):
            logits = writer.read(written)[0]
            if keeps_predictions:
                predictions.append(logits)
            verdicts = None
            if gate.signal == "oracle":
                verdicts = helper.read(written)
                value = regret(verdicts[0], logits)
            elif draw is not None:
                value = draw()
            else:
                value = entropy_bits(logits) if gate.signal == "entropy" else float(uncertainty(logits, gate.signal))
            check_signal(value, len(written))
            fired = gate.fires(value)
            result.signal.append(value)
            if fired:
                result.large_calls += 1
                if verdicts is None:
                    unread = len(helper.prompt) + len(written) - helper.seen
                    verdicts = helper.read(written, min(unread, len(written) + 1) if gate.rollback is not None else 1)
                stands = standing(verdicts, written, gate.rollback)
                if excess := len(written) - stands:
                    result.rollbacks += 1
                    result.discarded += excess
                    writer.take_back(excess, predictions[stands] if keeps_predictions else None)
                    helper.take_back(excess, verdicts[-1 - excess])
                    for kept, length in ((written, stands), (authors, stands), (result.signal, stands + 1)):
                        del kept[length:]
                    del predictions[stands + 1 :]
                written.append(choose(verdicts[-1 - excess]))
            else:
                written.append(choose(logits))
            authors.append(LARGE if fired else SMALL)
            if fired or gate.rollback is None:
                outlet.show(written)
    outlet.show(written)
    result.seconds = time.perf_counter() - started
    result.first_token_seconds = outlet.first - started
    outlet.end()
    result.text = tokenizer.decode(written, skip_special_tokens=True)
    return result


def regret(large_logits: torch.Tensor, small_logits: torch.Tensor) -> float:
    """By how many bits the large model prefers its own choice to the small one's."""
    token = int(small_logits.argmax(-1))
    large_logits = large_logits.to(torch.promote_types(large_logits.dtype, torch.float32))
    if int(large_logits.argmax(-1)) == token:
        return 0.0
    # Of two choices that are equally probable one is taken: that is a difference, however small.
    return max(float(large_logits.max() - large_logits[token]) / math.log(2), 1e-9)


def standing(verdicts: torch.Tensor, written: list[int], rollback: float | None) -> int:
    """How many of the tokens stand when the large model's predictions `[n, vocabulary]` judge the last n - 1."""
    judged = verdicts.shape[0] - 1
    if rollback is None or not judged:
        return len(written)
    log_p = verdicts[:-1].to(torch.promote_types(verdicts.dtype, torch.float32)).log_softmax(-1)
    tokens = torch.tensor(written[-judged:], device=verdicts.device)
    cost = log_p.gather(-1, tokens[:, None])[:, 0] / -math.log(2)
    too_dear = (cost > rollback).tolist()
    return len(written) - judged + (too_dear.index(True) if True in too_dear else judged)
