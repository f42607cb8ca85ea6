"""Entropy-gated generation: a small model writes, and where it is unsure a large model writes that token.

    gate = EntropyGate.calibrate(small, tokenizer, texts, percentile=80)
    result = gated_generate(small, large, tokenizer, "Once upon a time", gate)
    result.text, result.usage, result.authors

Both models keep caches. The large one is idle until the gate fires; then it reads all tokens that it has not seen in
one forward and writes the next one. With usage p and cost ratio c (small to large, per token) no gate can be faster
than `1 / (c + p)` times the large model. Here are the gate, its generation loop and the plain loops to compare with;
how a threshold is found is in `calibration.py`. One text at a time.
"""

import math
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import pandas as pd
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from helpers.generation import PolicyDriver, synchronise
from helpers.memory import explain_out_of_memory
from helpers.models import encode

SIGNALS = ("entropy", "max_prob", "margin", "random", "oracle")
SMALL, LARGE = "small", "large"

CacheFactory = Callable[[PreTrainedModel], Cache | PolicyDriver]


class Streamer(Protocol):
    """What `generate()` streams to as well, such as `transformers.TextStreamer`."""

    def put(self, value: torch.Tensor) -> None: ...

    def end(self) -> None: ...


def uncertainty(logits: torch.Tensor, signal: str = "entropy") -> torch.Tensor:
    """How unsure a next-token distribution is: `[..., vocabulary]` to `[...]`, in float32 at least; higher: less sure.

    "entropy" in bits; "max_prob" is 1 - the largest probability; "margin" is 1 - (the largest - the second).

    >>> uncertainty(torch.zeros(4)).item()  # uniform over 4: two bits
    2.0
    """
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    if signal == "entropy":
        return torch.special.entr(p).sum(-1) / math.log(2)
    if signal == "max_prob":
        return 1 - p.amax(-1)
    if signal == "margin":
        best = p.topk(2, dim=-1).values
        return 1 - (best[..., 0] - best[..., 1])
    raise ValueError(f"signal must be one of entropy, max_prob, margin to be read from logits, got {signal!r}")


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


@dataclass
class Generated:
    """A text and how it came about; the lists have one entry a token, in order.

    `signal` is what the gate saw when the token was decided (NaN without a gate). `seconds` is the whole
    time, the prompt included; `first_token_seconds` the time until the first token stood. `discarded` counts the
    tokens that `rollbacks` took back.
    """

    text: str
    token_ids: list[int]
    authors: list[str]  # "small" or "large"
    signal: list[float]
    seconds: float
    first_token_seconds: float
    large_calls: int = 0
    rollbacks: int = 0
    discarded: int = 0

    @property
    def usage(self) -> float:
        """Share of the tokens that the large model wrote."""
        return self.authors.count(LARGE) / len(self.authors) if self.authors else 0.0


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


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model of this tokenizer expects it: in its chat template if it has one.

    Raises `ValueError` for a prompt of white space.
    """
    if not tokenizer.chat_template:
        return encode(tokenizer, prompt)
    if not prompt.strip():
        raise ValueError("prompt is empty: there is nothing to go on from")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_same_tokens(small: PreTrainedTokenizerBase, large: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` that says what differs unless both tokenizers give the same ids the same meaning."""
    if small is large:
        return
    ours, theirs = small.get_vocab(), large.get_vocab()
    differ = next((token for token, at in ours.items() if theirs.get(token, at) != at), None)
    only = next(iter(ours.keys() ^ theirs.keys()), None)
    reason = None
    if len(ours) != len(theirs):
        reason = f"the small model's has {len(ours)} tokens and the large one's {len(theirs)}"
    elif only is not None:
        reason = f"token {only!r} is only in the {'small' if only in ours else 'large'} model's"
    elif differ is not None:
        reason = (
            f"token {differ!r} is number {ours[differ]} in the small model's and {theirs[differ]} in the large one's"
        )
    elif small.eos_token_id != large.eos_token_id:
        reason = f"texts end with {small.eos_token!r} in the small model's and {large.eos_token!r} in the large one's"
    if reason:
        raise ValueError(f"the two models must share one tokenizer, since they read each other's tokens: {reason}")


def check_context(model: PreTrainedModel, name: str, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `ValueError` where the prompt and what is to be written do not fit into the model's context."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise ValueError(
            f"prompt: {prompt_tokens} tokens and max_new_tokens={max_new_tokens} do not fit into the context of the "
            f"{name} model ({limit} tokens)"
        )


def check_signal(value: float, written: int) -> None:
    """Raise `ValueError` where the signal of the token after `written` ones is NaN: its logits were no numbers."""
    if math.isnan(value):
        raise ValueError(
            f"logits hold NaN or infinity after {written} written token(s), so that there is no entropy to gate by: "
            "run the models in float32 or bfloat16, or look for the first layer whose output is not finite"
        )


def end_tokens(*models: PreTrainedModel) -> set[int]:
    """Token ids that end a text for any of the models."""
    ends: set[int] = set()
    for model in models:
        ids = model.generation_config.eos_token_id
        ends |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return ends


@dataclass
class _Reader:
    """A model, its cache and how far it has read: `read` catches up with a text."""

    model: PreTrainedModel
    prompt: list[int]
    cache: Cache | None
    driver: PolicyDriver | None = None
    seen: int = 0

    @classmethod
    def start(cls, model: PreTrainedModel, prompt: list[int], factory: CacheFactory | None) -> "_Reader":
        made = factory(model) if factory else DynamicCache(config=model.config)
        driver = made if isinstance(made, PolicyDriver) else None
        cache = driver.cache if driver else made
        if cache.get_seq_length():
            raise ValueError(
                f"the cache of the {model.config.model_type} model must be empty, as every text starts anew"
            )
        return cls(model, prompt, cache, driver)

    def read(self, written: list[int], keep: int = 1) -> torch.Tensor:
        """Read what is new of prompt and `written`; the last `keep` predictions, `[keep, vocabulary]`."""
        start = len(self.prompt)
        new = written[self.seen - start :] if self.seen >= start else self.prompt[self.seen :] + written
        ids = torch.tensor([new], device=self.model.device)
        every = self.driver is not None and bool(self.driver.wanted)
        with explain_out_of_memory(f"reading {len(new)} token(s) of a gated text", (self.model, self.cache)):
            logits = self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=0 if every else keep).logits
            if self.driver is not None:
                self.driver.observe(ids, logits)
        self.seen += len(new)
        return logits[0, -keep:]

    def take_back(self, tokens: int, last_logits: torch.Tensor | None) -> None:
        if self.driver is not None:
            self.driver.crop(tokens, None if last_logits is None else last_logits[None])
        else:
            self.cache.crop(-tokens)
        self.seen -= tokens


class _Chooser:
    """The next token of a distribution: the most probable, or drawn at `temperature` on the CPU from a seed."""

    def __init__(self, temperature: float, seed: int):
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
        self.temperature, self.generator = temperature, torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        if not self.temperature:
            return int(logits.argmax(-1))
        p = (logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature).softmax(-1)
        return int(torch.multinomial(p.cpu(), 1, generator=self.generator))


class _Outlet:
    """Hands tokens to the streamer once they stand, and remembers when the first did."""

    def __init__(self, streamer: Streamer | None, prompt: list[int]):
        self.streamer, self.shown, self.first = streamer, 0, 0.0
        if streamer is not None:
            streamer.put(torch.tensor([prompt]))

    def show(self, written: list[int]) -> None:
        if not self.shown and written:
            self.first = time.perf_counter()
        if self.streamer is not None:
            for token in written[self.shown :]:
                self.streamer.put(torch.tensor([token]))
        self.shown = len(written)

    def end(self) -> None:
        if self.streamer is not None:
            self.streamer.end()


def _draws(gate: EntropyGate, prompt: list[int]) -> Callable[[], float]:
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
    choose = _Chooser(temperature, seed)
    writer = _Reader.start(small, prompt_ids(tokenizer, prompt), small_cache)
    helper = _Reader.start(large, prompt_ids(large_tokenizer, prompt), large_cache)
    check_context(small, SMALL, len(writer.prompt), max_new_tokens)
    check_context(large, LARGE, len(helper.prompt), max_new_tokens)
    ends = end_tokens(small, large) if stop_at_end else set()
    draw = _draws(gate, writer.prompt) if gate.signal == "random" else None
    keeps_predictions = gate.rollback is not None and writer.driver and "surprisal" in writer.driver.wanted
    predictions: list[torch.Tensor] = []  # of the small model, one a step, where a rollback may need them
    result = Generated("", [], [], [], 0.0, 0.0)
    written, authors = result.token_ids, result.authors

    synchronise(small.device)
    started = time.perf_counter()
    outlet = _Outlet(streamer, writer.prompt)
    # Faster than no_grad, but what a packed cache keeps for later texts must not be born in it.
    with torch.inference_mode(small_cache is None and large_cache is None), torch.no_grad():
        while len(written) < max_new_tokens and not (written and written[-1] in ends):
            logits = writer.read(written)[0]
            if keeps_predictions:
                predictions.append(logits)
            verdicts, token = None, None
            if gate.signal == "oracle":
                verdicts = helper.read(written)
                value, token = _regret(verdicts[0], logits)
            elif draw is not None:
                value = draw()
            else:
                value, token = _opinion(logits, gate.signal)
            check_signal(value, len(written))
            fired = gate.fires(value)
            result.signal.append(value)
            if fired:
                result.large_calls += 1
                if verdicts is None:
                    unread = len(helper.prompt) + len(written) - helper.seen
                    verdicts = helper.read(written, min(unread, len(written) + 1) if gate.rollback is not None else 1)
                stands = _standing(verdicts, written, gate.rollback)
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
                written.append(choose(logits) if temperature or token is None else token)
            authors.append(LARGE if fired else SMALL)
            if fired or gate.rollback is None:
                outlet.show(written)
    outlet.show(written)
    result.seconds = time.perf_counter() - started
    result.first_token_seconds = outlet.first - started
    outlet.end()
    result.text = tokenizer.decode(written, skip_special_tokens=True)
    return result


def _opinion(logits: torch.Tensor, signal: str) -> tuple[float, int]:
    """Signal and most probable token, in one host read (float32 holds every token id exactly)."""
    value, token = uncertainty(logits, signal), logits.argmax(-1)
    value, token = torch.stack((value, token.to(value.dtype))).tolist()
    return value, int(token)


def _regret(large_logits: torch.Tensor, small_logits: torch.Tensor) -> tuple[float, int]:
    """By how many bits the large model prefers its own choice to the small one's, and that one's choice."""
    token = int(small_logits.argmax(-1))
    large_logits = large_logits.to(torch.promote_types(large_logits.dtype, torch.float32))
    if int(large_logits.argmax(-1)) == token:
        return 0.0, token
    # Of two choices that are equally probable one is taken: that is a difference, however small.
    return max(float(large_logits.max() - large_logits[token]) / math.log(2), 1e-9), token


def _standing(verdicts: torch.Tensor, written: list[int], rollback: float | None) -> int:
    """How many of the tokens stand when the large model's predictions `[n, vocabulary]` judge the last n - 1."""
    judged = verdicts.shape[0] - 1
    if rollback is None or not judged:
        return len(written)
    log_p = verdicts[:-1].to(torch.promote_types(verdicts.dtype, torch.float32)).log_softmax(-1)
    tokens = torch.tensor(written[-judged:], device=verdicts.device)
    cost = log_p.gather(-1, tokens[:, None])[:, 0] / -math.log(2)
    too_dear = (cost > rollback).tolist()
    return len(written) - judged + (too_dear.index(True) if True in too_dear else judged)


@torch.inference_mode()
def plain_generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    use_cache: bool = True,
    author: str = LARGE,
    streamer: Streamer | None = None,
    stop_at_end: bool = True,
    ends: set[int] | None = None,
) -> Generated:
    """One model alone, in the same loop as `gated_generate`: the baselines, with a cache and (naive) without.

    `ends` are the token ids that end the text, by default the model's own.
    """
    choose, ids = _Chooser(temperature, seed), prompt_ids(tokenizer, prompt)
    check_context(model, author, len(ids), max_new_tokens)
    ends = (end_tokens(model) if ends is None else ends) if stop_at_end else set()
    reader = _Reader.start(model, ids, None)
    written: list[int] = []
    synchronise(model.device)
    started = time.perf_counter()
    outlet = _Outlet(streamer, ids)
    while len(written) < max_new_tokens and not (written and written[-1] in ends):
        logits = reader.read(written)[0] if use_cache else _read_all(model, ids + written)[-1]
        written.append(choose(logits))
        outlet.show(written)
    seconds = time.perf_counter() - started
    outlet.end()
    text = tokenizer.decode(written, skip_special_tokens=True)
    n = len(written)
    return Generated(text, written, [author] * n, [math.nan] * n, seconds, outlet.first - started)


def _read_all(model: PreTrainedModel, ids: list[int], keep: int = 1) -> torch.Tensor:
    """The last `keep` predictions after a whole text, read without a cache: `[keep, vocabulary]`."""
    given = torch.tensor([ids], device=model.device)
    return model(input_ids=given, use_cache=False, logits_to_keep=keep).logits[0]


@torch.inference_mode()
def reference_gated_generate(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    gate: EntropyGate,
    max_new_tokens: int = 50,
    temperature: float = 0.0,
    seed: int = 0,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
) -> Generated:
    """What `gated_generate` must write, without caches: both models read the whole text at every step."""
    choose = _Chooser(temperature, seed)
    small_ids, large_ids = (prompt_ids(each, prompt) for each in (tokenizer, large_tokenizer or tokenizer))
    draw, ends = _draws(gate, small_ids), end_tokens(small, large)
    result = Generated("", [], [], [], 0.0, 0.0)
    judged = 0  # tokens before this one have been read by the large model in full
    started = time.perf_counter()
    while len(result.token_ids) < max_new_tokens and not set(result.token_ids[-1:]) & ends:
        written = result.token_ids
        logits = _read_all(small, small_ids + written)[0]
        verdicts = _read_all(large, large_ids + written, len(written) + 1)
        if gate.signal == "oracle":
            value = _regret(verdicts[-1], logits)[0]
        else:
            value = draw() if gate.signal == "random" else float(uncertainty(logits, gate.signal))
        if gate.fires(value):
            stands = _standing(verdicts[judged:], written, gate.rollback)
            result.rollbacks += stands < len(written)
            result.discarded += len(written) - stands
            result.token_ids = [*written[:stands], choose(verdicts[stands])]
            result.authors = [*result.authors[:stands], LARGE]
            result.signal = [*result.signal, value][: stands + 1]
            result.large_calls += 1
            judged = stands + 1
        else:
            result.token_ids = [*written, choose(logits)]
            result.authors.append(SMALL)
            result.signal.append(value)
        if len(result.token_ids) == 1:
            result.first_token_seconds = time.perf_counter() - started
    result.seconds = time.perf_counter() - started
    result.text = tokenizer.decode(result.token_ids, skip_special_tokens=True)
    return result
