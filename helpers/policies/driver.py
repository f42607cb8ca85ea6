"""`PolicyDriver`: the only place where policies and caches meet.

It computes the features that a policy reads, asks it for widths once whole blocks are there, and commits and settles
them. What runs the model is `CachedModel`, or `generate()`.
"""

import copy

import numpy as np
import torch
from transformers import LogitsProcessor, PreTrainedModel

from helpers.cache import PackedKVCache, explain_out_of_memory
from helpers.cache.quantization import Widths, width_pair
from helpers.models import check_not_empty
from helpers.policies.features import TokenFeatures, confidence_of, entropy_of, log_probabilities, surprisal_of
from helpers.policies.policy import Policy
from helpers.policies.rarity import TokenCounts


class PolicyDriver(LogitsProcessor):
    """Commits the tokens of `cache` at the widths that `policy` chooses.

    In `generate()` it works as a logits processor. `generate()` shows its caller only the last logits, so a policy
    that reads features needs what is new in it run through `prefill` first, in each turn of a conversation:

        driver = PolicyDriver(model, cache, policy)
        model.generate(**driver.prefill(inputs), cache=cache, logits_processor=[driver])

    `copy.deepcopy((cache, driver))` gives a pair that goes on by itself: texts that begin alike share what was read.

    Policies that read no features need no prefill and work with beams; the others refuse beams. Among several logits
    processors the driver belongs first, or it sees what the others made of the logits.

    Rarity goes on from `counts` (by default those that the policy was trained with), in each row on a copy of its
    own. `extra` names features that `observe` computes although the policy does not read them.
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
        self.wanted = {*policy.needs, *extra}
        if unknown := self.wanted - set(TokenFeatures.__dataclass_fields__):
            raise ValueError(f"{policy.name}: unknown feature(s) {sorted(unknown)}")
        for what, wanted, flag in (
            ("attn_var", "attn_var" in self.wanted, "record_variance"),
            ("received attention", policy.needs_received, "record_received"),
        ):
            if wanted and not cache.reads_packed:
                raise ValueError(f"{what} needs packed attention: call use_packed_attention(model) first")
            if wanted:
                setattr(cache, flag, True)
        self.plan = None if policy.needs else policy.plan  # what reads features is asked for every width
        if policy.needs and policy.plan is not None and policy.plan.steps:
            raise ValueError(f"{policy.name}: a schedule goes by age alone and cannot read {', '.join(policy.needs)}")
        cache.plan, cache.holds = self.plan, self.plan is None
        cache.record_errors = bool(self.wanted & {"key_error", "value_error"})
        note = f"; '{policy.name}' reads logits token by token and cannot follow beam search"
        cache.rows_note = note if policy.needs else ""
        self.start_counts = counts or policy.start_counts or TokenCounts()
        self.reset()

    def reset(self) -> None:
        """Forget the text; call it together with `cache.reset()`."""
        self._text: list[torch.Tensor] = []  # every token that was read, [B, tokens] each
        self.token_ids: torch.Tensor | None = None  # whose widths are not chosen yet, [B, tokens]
        self.features = TokenFeatures()  # of the same
        self.chosen: list[torch.Tensor] = []  # widths committed so far, [B, tokens] each
        self.row_counts: list[TokenCounts] | None = None  # where rarity is wanted: counts of each row,
        self.committed_ids: list[torch.Tensor] = []  # and the committed token ids that they count, [B, tokens] each
        self.latest = TokenFeatures()  # of the tokens observed last
        self.last_log_p: torch.Tensor | None = None  # [B, vocabulary], the newest prediction if surprisal is wanted

    def restore(self, known: dict[str, torch.Tensor], counts: bool) -> None:
        """Take over what another driver of the same policy knew, see `helpers.policies.saving`."""
        self.reset()
        self._text = [known["text"]] if "text" in known else []
        self.token_ids, self.last_log_p = known.get("token_ids"), known.get("last_log_p")
        features = {name.removeprefix("features."): x for name, x in known.items() if name.startswith("features.")}
        self.features = TokenFeatures(**features)
        self.chosen = [known["chosen"].cpu()] if "chosen" in known else []
        if counts:
            self.committed_ids = [known["committed_ids"]] if "committed_ids" in known else []
            self.row_counts = [self.start_counts.copy() for _ in known["text"]]
            for row_counts, row in zip(self.row_counts, known.get("committed_ids", []), strict=False):
                row_counts.rarity(row.tolist())

    @property
    def features(self) -> TokenFeatures:
        """Of the tokens whose width is not chosen yet."""
        if len(self._parts) > 1:  # joined when somebody looks, not at every token
            self._parts = [TokenFeatures.join(self._parts)]
        return self._parts[0]

    @features.setter
    def features(self, features: TokenFeatures) -> None:
        self._parts = [features]

    def __deepcopy__(self, memo: dict) -> "PolicyDriver":
        """A driver that goes on by itself, with a copy of the cache; the model is the same."""
        memo[id(self.model)] = self.model
        copied = memo[id(self)] = PolicyDriver.__new__(PolicyDriver)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def text(self) -> torch.Tensor | None:
        """Every token that was read, `[B, tokens]`; None before the first."""
        if len(self._text) > 1:  # joined when somebody looks, not at every token
            self._text = [torch.cat(self._text, dim=1)]
        return self._text[0] if self._text else None

    @torch.no_grad()
    def prefill(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Read what the cache does not hold yet, but for the last token, in one forward; return `inputs` unchanged.

        `inputs`: `input_ids` `[B, tokens]`, the whole text so far, and, for left-padded rows, `attention_mask`. Raises
        `ValueError` where the text does not begin with what was read.
        """
        check_not_empty(inputs["input_ids"])
        known, mask = self.cache.get_seq_length(), inputs.get("attention_mask")
        self._expect_same_text(inputs["input_ids"], known)
        input_ids = inputs["input_ids"][:, known:-1]
        if input_ids.shape[1]:
            kwargs = {}
            if mask is not None and not bool(mask.all()):
                mask = mask[:, :-1]
                positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
                kwargs = {"attention_mask": mask, "position_ids": positions[:, known:]}
                if not self.cache.stores:  # the first commit centres keys by tokens that are no padding
                    self.cache.visible = mask.bool()
            with explain_out_of_memory("reading the prompt", (self.model, self.cache)):
                self.observe(input_ids, self.model(input_ids=input_ids, cache=self.cache, **kwargs).logits)
        return inputs

    def _expect_same_text(self, input_ids: torch.Tensor, known: int) -> None:
        read = None if self.text is None else self.text[:, :known]
        if read is None or read.shape[1] < known:  # somebody else has read something
            return
        if input_ids.shape[0] != read.shape[0]:
            raise ValueError(
                f"input_ids has {input_ids.shape[0]} row(s) and the cache {read.shape[0]}: reset cache and driver "
                "before another batch"
            )
        length = min(known, input_ids.shape[1])
        differs = (read[:, :length] != input_ids[:, :length]).any(0).nonzero()
        same = int(differs[0]) if len(differs) else length
        if same < known:
            raise ValueError(
                f"input_ids must begin with the {known} tokens that the cache has read, but only the first {same} are "
                f"the same: take the others back with driver.crop({known - same}), or reset cache and driver"
            )

    def observe(self, token_ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Take note of tokens `[B, n]` just read and of their logits `[B, n, vocabulary]`, and commit what is ready."""
        log_p = log_probabilities(logits) if self.wanted & {"entropy", "confidence", "surprisal"} else None
        self.latest = TokenFeatures(
            entropy=entropy_of(log_p) if "entropy" in self.wanted else None,
            confidence=confidence_of(log_p) if "confidence" in self.wanted else None,
            attn_var=self.cache.attention_variance if "attn_var" in self.wanted else None,
            surprisal=self._surprisal(token_ids, log_p) if "surprisal" in self.wanted else None,
        )
        self._parts.append(self.latest)
        self._text.append(token_ids)
        self.token_ids = token_ids if self.token_ids is None else torch.cat([self.token_ids, token_ids], dim=1)
        self._commit_ready()

    def _surprisal(self, token_ids: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
        """What each token cost under the prediction before it; the first of a text had none and gets 0."""
        before, self.last_log_p = self.last_log_p, log_p[:, -1]
        first = log_p.new_zeros(len(log_p), 1) if before is None else surprisal_of(before, token_ids[:, 0])[:, None]
        if token_ids.shape[1] == 1:
            return first
        return torch.cat([first, surprisal_of(log_p[:, :-1], token_ids[:, 1:])], dim=1)

    def crop(self, tokens: int, last_logits: torch.Tensor | None = None) -> None:
        """Take back the newest `tokens` tokens: from the cache and from all notes made of them.

        `last_logits` `[B, vocabulary]` is the prediction after the last token that stays; a policy that reads
        surprisal needs it for the token that comes next. Raises `ValueError` where it is missing then, or where the
        cache holds fewer tokens.
        """
        held = self.cache.get_seq_length()
        if not 0 <= tokens <= held:
            raise ValueError(f"tokens must lie between 0 and {held}, which are read, got {tokens}")
        if not tokens:
            return
        if "surprisal" in self.wanted and last_logits is None and tokens < held:
            raise ValueError(f"'{self.policy.name}' reads surprisal: crop needs last_logits, the prediction before it")
        self.last_log_p = None if last_logits is None else log_probabilities(last_logits)
        self.cache.crop(-tokens)
        self._text = [] if self.text is None else [self.text[:, : held - tokens]]
        committed, rest = self.cache.committed, self.cache.get_seq_length() - self.cache.committed
        self.token_ids = None if self.token_ids is None else self.token_ids[:, :rest]
        self.features = self.features.slice(0, rest)
        self.chosen = [torch.cat(self.chosen, dim=1)[:, :committed]] if self.chosen else []
        if self.committed_ids:
            known = torch.cat(self.committed_ids, dim=1)
            for counts, row in zip(self.row_counts, known[:, committed:].tolist(), strict=True):
                counts.forget(row)
            self.committed_ids = [known[:, :committed]]

    def _commit_ready(self) -> None:
        if self.plan is not None:
            self.cache.commit_ready()
            if done := self.cache.committed - sum(widths.shape[1] for widths in self.chosen):
                average = sum(self.plan.pair) / 2
                self.chosen.append(torch.full((self.token_ids.shape[0], done), average))
                self.features = self.features.slice(done, None)
                self.token_ids = self.token_ids[:, self.token_ids.shape[1] - self.cache.tail_length :]
        elif ready := self.cache.undecided:
            features, held = self._oldest(ready), self.cache.held
            self._doubt_logits(features)
            self.cache.commit(self._choose(features, ready), ready)
            if held:  # what has been stored at 8 bits already has no more
                self.chosen[-1] = self.chosen[-1].clone()
                self.chosen[-1][:, :held].clamp_(max=8)
            if self.row_counts is not None:
                self.committed_ids.append(self.token_ids[:, :ready])
            self.features = self.features.slice(ready, None)
            self.token_ids = self.token_ids[:, ready:]

    def _oldest(self, tokens: int) -> TokenFeatures:
        """Features of the oldest `tokens` tokens whose width is not chosen yet."""
        features = self.features.slice(0, tokens)
        if "rarity" in self.wanted:
            token_ids = self.token_ids[:, :tokens]
            if self.row_counts is None:
                self.row_counts = [self.start_counts.copy() for _ in token_ids]
            rarities = [counts.rarity(row) for counts, row in zip(self.row_counts, token_ids.tolist(), strict=True)]
            features.rarity = torch.tensor(rarities, dtype=torch.float32, device=token_ids.device)
        if self.wanted & {"key_error", "value_error"}:
            features.key_error, features.value_error = self.cache.tail_errors(tokens)
        return features

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
            self.cache.checks.expect(known.sum(), message, message)

    def _choose(self, features: TokenFeatures, tokens: int) -> torch.Tensor | Widths:
        """Widths of the oldest `tokens` tokens of the tail, noted in `chosen`."""
        rows = self.token_ids.shape[0]
        widths = self.policy.widths(features, rows, tokens)
        if isinstance(widths, np.ndarray):
            widths = torch.from_numpy(widths)
        if isinstance(widths, torch.Tensor):
            if widths.shape != (rows, tokens):
                shapes = f"{[rows, tokens]}, got {list(widths.shape)}"
                raise ValueError(f"{self.policy.name}: widths must have shape {shapes}")
            self.chosen.append(widths)
        else:
            keys, values = width_pair(widths)
            self.chosen.append(torch.full((rows, tokens), keys if keys == values else (keys + values) / 2))
        return widths

    def widths_so_far(self) -> torch.Tensor:
        """Widths of all tokens, `[B, tokens]`: as committed, and for the tail as the policy would choose now."""
        looking_ahead = copy.copy(self)
        looking_ahead.policy, looking_ahead.chosen = copy.deepcopy(self.policy), list(self.chosen)
        looking_ahead.row_counts = [counts.copy() for counts in self.row_counts] if self.row_counts else None
        if self.token_ids is not None and (tail := self.token_ids.shape[1]):
            looking_ahead._choose(looking_ahead._oldest(tail), tail)
        return torch.cat([widths.cpu() for widths in looking_ahead.chosen], dim=1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        held = self.cache.get_seq_length() - self.cache.committed
        if input_ids.shape[1] != self.cache.get_seq_length():
            raise ValueError(
                f"the cache holds {self.cache.get_seq_length()} tokens and the text {input_ids.shape[1]}: PolicyDriver "
                "cannot follow assisted generation, which reads guesses ahead; use PackedKVCache(bits=...) with it"
            )
        if not self.policy.needs:
            self._text, self.token_ids = [input_ids], input_ids[:, -held:]
            self._commit_ready()
            return scores
        known = self.token_ids.shape[1] if self.token_ids is not None else 0
        if known >= held:  # an earlier generate() read one token more than it kept, and took it back
            known = held - 1
            self.token_ids, self.features = self.token_ids[:, :known], self.features.slice(0, known)
            self._text = [self.text[:, : input_ids.shape[1] - 1]]
        if held - known > 1:
            raise ValueError(
                f"'{self.policy.name}' reads {', '.join(sorted(self.wanted))} of every token, and generate() shows "
                "only the last one's: call driver.prefill(inputs) before each generate() (beam search is not possible "
                "with this policy)"
            )
        self.observe(input_ids[:, -1:], scores[:, None])
        return scores
