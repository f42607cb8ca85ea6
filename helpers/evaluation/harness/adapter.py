"""`PackedLM`: a model of the harness whose every request reads through a cache of a `Method`, committed before.

The harness's own route scores a context and its continuation in one forward, or in the first that fills a cache: there
nothing is quantized yet, so that a quantized cache changes no digit (EleutherAI/lm-evaluation-harness issue 1105). Here
the context is read and committed first, and the continuation reads what the cache made of it.
"""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from lm_eval.models.huggingface import HFLM
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.methods import FullPrecision, Method
from helpers.evaluation.multiple_choice import read_endings
from helpers.policies import score_blocks
from helpers.policies.features import log_probabilities

WHOLE = 128  # tokens of a continuation that are read in one forward; others a block at a time, each committed

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, tokens of the context, of the continuation
Answer = tuple[float, bool]  # log-likelihood in nats; whether greedy decoding would write the continuation


class PackedLM(HFLM):
    """`HFLM` through the caches that `method` opens.

    Continuations of one context are read together, and prompts are written `batch_size` at a time.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        method: Method | None = None,
        batch_size: int = 1,
        max_length: int | None = None,
    ):
        """`max_length`: tokens of the longest text, by default the model's context."""
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size, max_length=max_length
        )
        self.method = FullPrecision() if method is None else method
        self.opened = 0  # texts so far, which seed random policies

    def _open(self):
        self.opened += 1
        return self.method.open(self.model, self.opened - 1)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[-(self.max_length + 1) :]  # a text that is too long loses its beginning
            groups.setdefault(tuple(whole[: -len(continuation)]), []).append(number)
        answers: dict[int, Answer] = {}
        for context, numbers in tqdm(groups.items(), self.method.name, disable=disable_tqdm, leave=False):
            # Texts without a context of their own, of which perplexity is asked, bring no text along.
            rolling = [requests[number][0] is None for number in numbers]
            found = self._score(list(context), [requests[number][2] for number in numbers], any(rolling))
            for number, answer in zip(numbers, found, strict=True):
                answers[number] = answer
                if requests[number][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[number][0], answer)
        return [answers[number] for number in range(len(requests))]

    def _score(self, context: list[int], continuations: list[list[int]], rolling: bool = False) -> list[Answer]:
        """Answers for the continuations of one context; raises `ValueError` where there is no context.

        `rolling` ones are the text itself, and read a block at a time however short they are.
        """
        if not context:
            raise ValueError(f"a continuation must leave room for its context within {self.max_length} tokens")
        cached = self._open()
        first = cached.read(torch.tensor([context], device=self.device), keep=1)
        answers: dict[int, Answer] = {}
        for number, tokens in enumerate(continuations):
            if rolling or len(tokens) > WHOLE:
                branch = cached if len(continuations) == 1 else copy.deepcopy(cached)
                answers[number] = self._score_long(branch, first, tokens)
        short = [number for number in range(len(continuations)) if number not in answers]
        if short:
            rows = [continuations[number] for number in short]
            width = max(map(len, rows))
            # Padding on the right: under causal attention no token ever sees it.
            endings = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
            logits = torch.cat([first.expand(len(rows), -1, -1), read_endings(cached, endings)], dim=1)
            for number, row, each, tokens in zip(short, rows, logits, endings, strict=True):
                answers[number] = _answer(each[: len(row)], tokens[: len(row)])
        return [answers[number] for number in range(len(continuations))]

    def _score_long(self, cached, first: torch.Tensor, tokens: list[int]) -> Answer:
        ids = torch.tensor([tokens], device=self.device)
        total, greedy = _answer(first[0], ids[0, :1])
        # The first piece ends where a block of the text ends: what comes after it is committed block by block.
        done = min(-cached.length % self.method.block, len(tokens) - 1)
        pieces = [(slice(0, done), cached.read(ids[:, :done]))] if done else []
        rest = ((slice(done + at.start, done + at.stop), x) for at, x in self._blocks(cached, ids[:, done:-1]))
        for at, logits in chain(pieces, rest):
            part, same = _answer(logits[0], ids[0, at.start + 1 : at.stop + 1])
            total, greedy = total + part, greedy and same
        return total, greedy

    def _blocks(self, cached, ids: torch.Tensor):
        return score_blocks(cached, ids, self.method.block) if ids.shape[1] else ()

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs) -> torch.Tensor:
        cached = self._open()
        processors = []
        if cached.driver is not None:
            processors = [cached.driver]
            if cached.driver.policy.needs:
                cached.driver.prefill({"input_ids": context, "attention_mask": kwargs["attention_mask"]})
        return super()._model_generate(
            context, max_length, stop, cache=cached.cache, logits_processor=processors, **kwargs
        )


def _answer(logits: torch.Tensor, tokens: torch.Tensor) -> Answer:
    """Of predictions `[n, vocabulary]` and the tokens `[n]` that came."""
    log_p = log_probabilities(logits).gather(-1, tokens[:, None])
    return float(log_p.double().sum()), bool((logits.argmax(-1) == tokens).all())
