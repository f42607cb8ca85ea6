"""Running a model through a cache under a policy: the driver, decoding token by token, scoring block by block.

`PolicyDriver` is the only place where policies and caches meet: it turns logits into features, asks the policy for
widths and commits. Two ways to feed a text, never mixed in one table: *deployment* (`prefill`, then decoding), on
which latency is measured, and *block by block* (`score_blocks`), each block a forward over the committed past, which
gives the numbers of decoding token by token at a fraction of the time.
"""

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel
from transformers.cache_utils import Cache

from helpers.features import TokenCounts, TokenFeatures, confidence_of, entropy_of, log_probabilities, surprisal_of
from helpers.kv_cache import PackedKVCache, width_pair
from helpers.memory import explain_out_of_memory
from helpers.packed_store import Demotion
from helpers.policies import Policy, Widths


class PolicyDriver(LogitsProcessor):
    """Commits the tokens of `cache` at the widths that `policy` chooses.

    In `generate()` it works as a logits processor. `generate()` shows its caller only the last logits, so a policy
    that reads features needs the prompt run through `prefill` first:

        driver = PolicyDriver(model, cache, policy)
        model.generate(**driver.prefill(inputs), cache=cache, logits_processor=[driver])

    Policies that read no features need no prefill and work with beams; the others refuse beams. `counts` are the
    token counts from which rarity starts (by default those that the policy was trained with; each row goes on with a
    copy of its own). `extra` names features that
    `observe` computes although the policy does not read them. Among several logits processors it belongs first, or
    it sees what the others made of the logits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PackedKVCache,
        policy: Policy,
        counts: TokenCounts | None = None,
        extra: tuple[str, ...] = (),
    ):
        self.model, self.cache, self.policy = model, cache, policy
        self.wanted = {*policy.needs, *policy.needs_settled, *extra}
        unknown = self.wanted - set(TokenFeatures.__dataclass_fields__)
        if unknown:
            raise ValueError(f"{policy.name}: unknown feature(s) {sorted(unknown)}")
        if "attn_var" in self.wanted:
            if not cache.reads_packed:
                raise ValueError("attn_var comes out of packed attention: call use_packed_attention(model) first")
            cache.record_variance = True
        if policy.needs_received:
            if not cache.reads_packed:
                raise ValueError("received attention needs packed attention: call use_packed_attention(model) first")
            cache.record_received = True
        note = f"; '{policy.name}' reads logits token by token and cannot follow beam search"
        self.reads_logits = bool(policy.needs or policy.needs_settled)
        cache.rows_note = note if self.reads_logits else ""
        self.start_counts = counts or policy.start_counts or TokenCounts()
        self.reset()

    def reset(self) -> None:
        """Forget the text; call it together with `cache.reset()`."""
        self.row_counts: list[TokenCounts] | None = None
        self.latest = TokenFeatures()  # of the tokens observed last
        self.last_log_p: torch.Tensor | None = None  # [B, vocabulary], the newest prediction if surprisal is wanted
        self.features = TokenFeatures()
        self.token_ids: torch.Tensor | None = None  # of the tokens in the tail
        self.chosen: list[torch.Tensor] = []  # widths committed so far, [B, tokens] each
        self.pending = TokenFeatures()  # of committed tokens from position `pending_start` on, for settling
        self.pending_start = 0
        self.committed_ids: list[torch.Tensor] = []  # where rarity counts them, [B, tokens] each

    @property
    def features(self) -> TokenFeatures:
        """Of the tokens in the tail."""
        if len(self._parts) > 1:  # joined when somebody looks, not at every token
            self._parts = [TokenFeatures.join(self._parts)]
        return self._parts[0]

    @features.setter
    def features(self, features: TokenFeatures) -> None:
        self._parts = [features]

    def crop(self, tokens: int, last_logits: torch.Tensor | None = None) -> None:
        """Take back the newest `tokens` tokens: from the cache and from all notes made of them.

        `last_logits` `[B, vocabulary]` is the prediction after the last token that stays; a policy that reads
        surprisal needs it for the token that comes next. Raises `ValueError` where it is missing then, or where the
        cache holds fewer tokens.
        """
        if not 0 <= tokens <= self.cache.get_seq_length():
            raise ValueError(
                f"tokens must lie between 0 and {self.cache.get_seq_length()}, which are read, got {tokens}"
            )
        if not tokens:
            return
        length = self.cache.get_seq_length() - tokens
        if "surprisal" in self.wanted and last_logits is None and length:
            raise ValueError(f"'{self.policy.name}' reads surprisal: crop needs last_logits, the prediction before it")
        self.last_log_p = None if last_logits is None else log_probabilities(last_logits)
        self.cache.crop(-tokens)
        committed = self.cache.committed
        if self.token_ids is not None:
            self.token_ids = self.token_ids[:, : length - committed]
        self.features = self.features.slice(0, length - committed)
        self.pending = self.pending.slice(0, max(0, committed - self.pending_start))
        self.pending_start = min(self.pending_start, committed)
        self.chosen = [torch.cat(self.chosen, dim=1)[:, :committed]] if self.chosen else []
        if self.committed_ids:
            known = torch.cat(self.committed_ids, dim=1)
            for counts, row in zip(self.row_counts, known[:, committed:].tolist(), strict=True):
                counts.forget(row)
            self.committed_ids = [known[:, :committed]]

    @torch.no_grad()
    def prefill(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Run all but the last prompt token in one full-precision forward, commit them, return `inputs` unchanged.

        `inputs`: `input_ids` `[B, tokens]` and, for left-padded rows, `attention_mask`.
        """
        input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        _check_tokens(input_ids)
        if input_ids.shape[1] > 1:
            kwargs = {}
            if mask is not None and not bool(mask.all()):
                kwargs = {
                    "attention_mask": mask[:, :-1],
                    "position_ids": (mask[:, :-1].long().cumsum(-1) - 1).clamp(min=0),
                }
                self.cache.visible = mask[:, :-1].bool()
            with explain_out_of_memory("reading the prompt", (self.model, self.cache)):
                logits = self.model(input_ids=input_ids[:, :-1], cache=self.cache, **kwargs).logits
                self.observe(input_ids[:, :-1], logits)
        return inputs

    def observe(self, token_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Take note of tokens `[B, n]` just read by the model and the logits `[B, n, vocabulary]` that came of them."""
        log_p = log_probabilities(logits) if self.wanted & {"entropy", "confidence", "surprisal"} else None
        self.latest = TokenFeatures(
            entropy=entropy_of(log_p) if "entropy" in self.wanted else None,
            confidence=confidence_of(log_p) if "confidence" in self.wanted else None,
            attn_var=self.cache.attention_variance if "attn_var" in self.wanted else None,
            surprisal=self._surprisal(token_ids, log_p) if "surprisal" in self.wanted else None,
        )
        self._parts.append(self.latest)
        self.token_ids = token_ids if self.token_ids is None else torch.cat([self.token_ids, token_ids], dim=1)
        self._commit_ready()

    def _surprisal(self, token_ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """What each token cost under the prediction before it; the first of a text had none and gets 0."""
        before, self.last_log_p = self.last_log_p, log_p[:, -1]
        first = log_p.new_zeros(len(log_p), 1) if before is None else surprisal_of(before, token_ids[:, 0])[:, None]
        if token_ids.shape[1] == 1:
            return first
        return torch.cat([first, surprisal_of(log_p[:, :-1], token_ids[:, 1:])], dim=1)

    def _commit_ready(self) -> None:
        if ready := self.cache.committable:
            features = self._oldest(ready)
            self._doubt_logits(features)
            self.cache.commit(self._choose(features, ready), ready, pending=bool(self.policy.steps))
            if self.policy.needs_settled:
                self.pending = TokenFeatures.join([self.pending, features])
            if self.row_counts is not None:
                self.committed_ids.append(self.token_ids[:, :ready])
            self.features = self.features.slice(ready, None)
            self.token_ids = self.token_ids[:, ready:]
            self._settle_ready()

    def _doubt_logits(self, features: TokenFeatures) -> None:
        """Have the cache's next host read find out whether the logits behind `features` were numbers."""
        known = features.confidence if features.entropy is None else features.entropy
        if known is not None:
            first = self.cache.committed
            message = (
                f"logits of tokens {first} to {first + known.shape[1] - 1} hold NaN or infinity: '{self.policy.name}' "
                "has no entropy to choose by; run the model in float32 or bfloat16, or look for the first layer whose "
                "output is not finite"
            )
            self.cache.doubt(known.sum(), message, message)

    def _settle_ready(self) -> None:
        """Move on the pending blocks that are old enough."""
        steps = self.policy.steps
        if not steps:
            return
        source, waited = self.policy.commit, 0
        for step in steps:
            # Blocks enter and leave a stage in order, so the newest that stay are as many as the blocks they wait for.
            excess = self.cache.pending_blocks(source) - (step.after - waited)
            if excess > 0:
                keep = round(step.keep * self.cache.block)
                last = step is steps[-1]
                moved = self.cache.pending_tokens(source, excess)
                self.cache.settle(source, step.bits, excess, keep, self._scores if keep else None, pending=not last)
                if last and self.policy.needs_settled:
                    self.pending = self.pending.slice(moved, None)
                    self.pending_start += moved
            source, waited = step.bits, step.after

    def _scores(self, demotion: Demotion) -> torch.Tensor:
        features = TokenFeatures()
        if self.policy.needs_settled:
            at = demotion.start - self.pending_start
            features = self.pending.slice(at, at + demotion.key_error.shape[-1])
        return self.policy.scores(demotion, features)

    def _oldest(self, tokens: int) -> TokenFeatures:
        """Features of the oldest `tokens` tokens of the tail."""
        features = self.features.slice(0, tokens)
        if "rarity" in self.wanted:
            features.rarity = self._rarity(self.token_ids[:, :tokens])
        if self.wanted & {"key_error", "value_error"}:
            features.key_error, features.value_error = self.cache.tail_errors(tokens)
        return features

    def _choose(self, features: TokenFeatures, tokens: int) -> torch.Tensor | Widths:
        """Widths of the oldest `tokens` tokens of the tail."""
        rows = self.token_ids.shape[0]
        widths = self.policy.widths(features, rows, tokens)
        if isinstance(widths, np.ndarray):
            widths = torch.from_numpy(widths)
        if isinstance(widths, torch.Tensor) and widths.shape != (rows, tokens):
            raise ValueError(f"{self.policy.name}: widths must have shape {[rows, tokens]}, got {list(widths.shape)}")
        record = widths
        if not isinstance(widths, torch.Tensor):
            keys, values = width_pair(widths)
            record = torch.full((rows, tokens), keys if keys == values else (keys + values) / 2)
        self.chosen.append(record)
        return widths

    def _rarity(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.row_counts is None:
            self.row_counts = [self.start_counts.copy() for _ in range(token_ids.shape[0])]
        rows = [counts.rarity(row) for counts, row in zip(self.row_counts, token_ids.tolist(), strict=True)]
        return torch.tensor(rows, dtype=torch.float32, device=token_ids.device)

    def widths_so_far(self) -> torch.Tensor:
        """Widths of all tokens, `[B, tokens]`: as committed, and for the tail as the policy would choose now."""
        tail = self.token_ids.shape[1] if self.token_ids is not None else 0
        if tail:
            looking_ahead = copy.copy(self)
            looking_ahead.policy, looking_ahead.chosen = copy.deepcopy(self.policy), list(self.chosen)
            looking_ahead.row_counts = [counts.copy() for counts in self.row_counts] if self.row_counts else None
            looking_ahead._choose(looking_ahead._oldest(tail), tail)
            return torch.cat([w.cpu() for w in looking_ahead.chosen], dim=1)
        return torch.cat([w.cpu() for w in self.chosen], dim=1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        held = self.cache.tail_length
        if input_ids.shape[1] != self.cache.get_seq_length():
            raise ValueError(
                f"the cache holds {self.cache.get_seq_length()} tokens and the text {input_ids.shape[1]}: PolicyDriver "
                "cannot follow assisted generation, which reads guesses ahead; use PackedKVCache(bits=...) with it"
            )
        if not self.reads_logits:
            self.token_ids = input_ids[:, -held:]
            self._commit_ready()
            return scores
        known = self.token_ids.shape[1] if self.token_ids is not None else 0
        if known >= held:  # an earlier generate() read one token more than it kept, and took it back
            known = held - 1
            self.token_ids, self.features = self.token_ids[:, :known], self.features.slice(0, known)
        if held - known > 1:
            raise ValueError(
                f"'{self.policy.name}' reads {', '.join(sorted(self.wanted))} of every token, and generate() shows "
                "only the last one's: call driver.prefill(inputs) first (beam search is not possible with this policy)"
            )
        self.observe(input_ids[:, -1:], scores[:, None])
        return scores


def score_blocks(
    model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache, driver: PolicyDriver | None = None, block: int = 16
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Feed texts `[B, tokens]` block by block; yield the positions of each block and its logits `[B, n, vocabulary]`.

    Each block is one forward over what the cache made of the blocks before. It is committed when the caller asks for
    the next one, so that a caller who looks at the cache sees it as the block's last token did. `block` should be
    the cache's own, or tokens would be seen in full precision that decoding sees quantized.
    """
    _check_tokens(input_ids)
    for start in range(0, input_ids.shape[1], block):
        ids = input_ids[:, start : start + block]
        with torch.no_grad(), explain_out_of_memory(f"reading tokens from {start} on", (model, cache)):
            logits = model(input_ids=ids, cache=cache).logits
        yield slice(start, start + ids.shape[1]), logits
        if driver is not None:
            driver.observe(ids, logits)


def _check_tokens(input_ids: torch.Tensor) -> None:
    if not input_ids.numel():
        raise ValueError("input_ids holds no token: there is nothing to read")


@dataclass
class DecodeResult:
    """What decoding gave: `token_ids` `[B, tokens]` read and written, and per decoded step its time in ms."""

    token_ids: torch.Tensor
    latency_ms: list[float]
    correct: torch.Tensor | None  # [B, steps]: was the next token of the forced text the most probable one?
    features: TokenFeatures  # of the tokens read in the loop, as far as the driver computes them


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    driver: PolicyDriver | None = None,
    max_new_tokens: int = 0,
    forced: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
) -> DecodeResult:
    """Decode one token a step, each step timed with everything that it causes (policy and commit included).

    With `forced`, `input_ids` `[B, tokens]` is a whole text that is read token by token, every step predicting the
    next token; else it is a prompt, read in one forward, after which `max_new_tokens` are written, greedily or
    sampled at `temperature`, until all rows have ended. Times are taken after the device has finished. Raises
    `ValueError` for what is to be written beyond the model's context.
    """
    if forced == bool(max_new_tokens):
        raise ValueError("decode either reads a text (forced=True) or writes max_new_tokens > 0, not both")
    _check_tokens(input_ids)
    if not forced:
        check_context(model, input_ids.shape[1], max_new_tokens)
    with explain_out_of_memory("reading a text" if forced else "writing", (model, cache)):
        return _decode(model, input_ids, cache, driver, max_new_tokens, forced, temperature, seed)


def check_context(model: PreTrainedModel, tokens: int, max_new_tokens: int = 0) -> None:
    """Raise `ValueError` where a text and what is to be written do not fit into the context of `model`."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and tokens + max_new_tokens > limit:
        written = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
        raise ValueError(
            f"a text of {tokens} tokens{written} does not fit into the context of this {model.config.model_type} model "
            f"({limit} tokens): cut it"
        )


def _decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    cache: Cache,
    driver: PolicyDriver | None,
    max_new_tokens: int,
    forced: bool,
    temperature: float,
    seed: int,
) -> DecodeResult:
    generator = torch.Generator(device=input_ids.device).manual_seed(seed)
    latencies, hits, collected = [], [], []
    text, logits = input_ids, None
    if not forced:
        logits = model(input_ids=input_ids, cache=cache).logits
        if driver is not None:
            driver.observe(input_ids, logits)
        logits = logits[:, -1]
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([] if ends is None else ends, device=input_ids.device).reshape(-1)
    finished = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for step in range(input_ids.shape[1] if forced else max_new_tokens):
        if forced:
            token = input_ids[:, step : step + 1]
        else:
            token = _next_token(logits, temperature, generator)
            text = torch.cat([text, token], dim=1)
            finished |= torch.isin(token[:, 0], ends)
            if bool(finished.all()):
                break
        synchronise(input_ids.device)
        started = time.perf_counter()
        logits = model(input_ids=token, cache=cache).logits
        if driver is not None:
            driver.observe(token, logits)
        synchronise(input_ids.device)
        latencies.append((time.perf_counter() - started) * 1000)
        if driver is not None:
            collected.append(driver.latest)
        logits = logits[:, -1]
        if forced and step + 1 < input_ids.shape[1]:
            hits.append(logits.argmax(-1) == input_ids[:, step + 1])
    correct = torch.stack(hits, dim=1) if hits else None
    return DecodeResult(text, latencies, correct, TokenFeatures.join(collected))


def _next_token(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if temperature <= 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial((logits.float() / temperature).softmax(-1), 1, generator=generator)


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
