"""What a gate gains and costs, on prompts: against the large model alone, the small one, and assisted generation.

Every method writes on the same prompts, up to the same length, in one interleaved run. ROUGE is against the reference
texts; *fidelity* is ROUGE-L against what the large model writes itself: 1 where the gate changes nothing.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import pandas as pd
from transformers import PreTrainedTokenizerBase

from helpers.cache import live_bytes, stored_bytes
from helpers.evaluation.rouge import Rouge
from helpers.evaluation.tracing import trace_cache
from helpers.gate.batch import gated_texts
from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.generation import gated_generate
from helpers.gate.pairs import Pair
from helpers.gate.prompts import end_tokens
from helpers.gate.study.baselines import assisted_generate, plain_generate
from helpers.gate.text import LARGE, SMALL, Generated
from helpers.gate.writing import CacheFactory
from helpers.policies import PolicyDriver

GATED, NAIVE, ASSISTED = "gated", "large, no cache", "assisted"
METHODS = (GATED, LARGE, SMALL, NAIVE, ASSISTED)


def evaluate_gate(
    pair: Pair,
    prompts: list[str],
    references: list[str],
    gate: EntropyGate | dict[str, EntropyGate],
    max_new_tokens: int = 50,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    methods: Sequence[str] = METHODS,
    repeats: int = 1,
    stop_at_end: bool = True,
    on_prompt: Callable[[pd.DataFrame], None] | None = None,
) -> pd.DataFrame:
    """One row a prompt and method: `tokens`, `seconds`, `first_token_seconds`, `usage`, ROUGE, `fidelity`, `text`.

    `shared_prefix` counts the tokens before the first that differs from the large model's own text.

    Greedy. The methods take turns, a prompt at a time, each beginning in turn; of `repeats` runs the median time
    counts. All are warmed up first. Texts end with the end-of-text token of either model, or with
    `stop_at_end=False` all have `max_new_tokens`. `on_prompt` gets the rows of each prompt as it is done. Several
    gates, by name, are methods each in the place of "gated".
    """
    gates = gate if isinstance(gate, dict) else {GATED: gate}
    if unknown := set(methods) - set(METHODS):
        raise ValueError(f"methods must be among {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
    if len(prompts) != len(references) or not prompts:
        raise ValueError(f"prompts and references must be as many, got {len(prompts)} and {len(references)}")
    if taken := set(gates) & set(METHODS) - {GATED}:
        raise ValueError(f"a gate cannot have the name of another method: {', '.join(sorted(taken))}")
    runs = _runs(pair, gates, methods, large_tokenizer or pair[2], stop_at_end)
    for method, run in runs.items():
        if not isinstance(gates.get(method), OnlineTracker):  # it must not learn from the warm-up
            run(prompt=prompts[0], max_new_tokens=min(8, max_new_tokens))
    order, rouge, tables = list(runs), Rouge(keep_in_memory=True), []
    for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        results: dict[str, list[Generated]] = {method: [] for method in runs}
        for turn in range(repeats):
            at = (i + turn) % len(order)
            for method in (*order[at:], *order[:at]):
                results[method].append(runs[method](prompt=prompt, max_new_tokens=max_new_tokens))
        tables.append(rows_of_prompt(i, results, reference, rouge))
        if on_prompt:
            on_prompt(tables[-1])
    return pd.concat(tables, ignore_index=True)


def evaluate_texts(
    pair: Pair,
    prompts: list[str],
    references: list[str],
    gates: dict[str, EntropyGate],
    max_new_tokens: int = 50,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> pd.DataFrame:
    """What `evaluate_gate` says of gates and of both models alone, written several prompts at once.

    Much faster, and its times mean nothing. `progress` is called with the number of prompts after each gate.
    """
    alone, written = {LARGE: EntropyGate(-math.inf), SMALL: EntropyGate(math.inf)}, {}
    for name, gate in (gates | alone).items():
        written[name] = gated_texts(*pair, prompts, gate, max_new_tokens, large_tokenizer=large_tokenizer)
        progress(len(prompts))
    rouge = Rouge(keep_in_memory=True)
    tables = [
        rows_of_prompt(i, {name: [results[i]] for name, results in written.items()}, reference, rouge)
        for i, reference in enumerate(references)
    ]
    return pd.concat(tables, ignore_index=True)


def _runs(
    pair: Pair,
    gates: dict[str, EntropyGate],
    methods: Sequence[str],
    large_tokenizer: PreTrainedTokenizerBase,
    stop_at_end: bool,
) -> dict[str, Callable[..., Generated]]:
    """By name, what writes a text when called with `prompt` and `max_new_tokens`."""
    small, large, tokenizer = pair
    plain = partial(plain_generate, ends=end_tokens(small, large) if stop_at_end else set())
    gated = partial(gated_generate, *pair, large_tokenizer=large_tokenizer, stop_at_end=stop_at_end)
    groups = {
        GATED: {name: partial(gated, gate=gate) for name, gate in gates.items()},
        LARGE: {LARGE: partial(plain, large, large_tokenizer)},
        SMALL: {SMALL: partial(plain, small, tokenizer, author=SMALL)},
        NAIVE: {NAIVE: partial(plain, large, large_tokenizer, use_cache=False)},
        ASSISTED: {ASSISTED: partial(assisted_generate, small, large, large_tokenizer, stop_at_end=stop_at_end)},
    }
    return {name: run for method in methods for name, run in groups[method].items()}


def rows_of_prompt(prompt: int, results: dict[str, list[Generated]], reference: str, rouge: Rouge) -> pd.DataFrame:
    """The rows of one prompt, from the runs of each method; what was written is that of the last."""
    last = {method: runs[-1] for method, runs in results.items()}
    large, texts = last.get(LARGE), [result.text for result in last.values()]
    rows = [
        {
            "prompt": prompt,
            "method": method,
            "tokens": len(result.token_ids),
            "seconds": statistics.median(run.seconds for run in results[method]),
            "first_token_seconds": statistics.median(run.first_token_seconds for run in results[method]),
            "usage": result.usage,
            "large_calls": result.large_calls,
            "rollbacks": result.rollbacks,
            "discarded": result.discarded,
        }
        for method, result in last.items()
    ]
    scores = rouge.compute(predictions=texts, references=[reference] * len(texts), average=False)
    return pd.DataFrame(rows).assign(
        **scores,
        fidelity=fidelity(texts, large.text, rouge) if large else float("nan"),
        shared_prefix=[_shared_prefix(result, large) for result in last.values()] if large else float("nan"),
        text=texts,
    )


def fidelity(texts: list[str], large: str, rouge: Rouge) -> list[float]:
    """ROUGE-L of each text against what the large model writes alone."""
    return rouge.compute(predictions=texts, references=[large] * len(texts), average=False)["rougeL"]


def _shared_prefix(result: Generated, large: Generated) -> int:
    same = [own == theirs for own, theirs in zip(result.token_ids, large.token_ids, strict=False)]
    return same.index(False) if False in same else len(same)


def evaluate_caches(
    pair: Pair,
    prompts: list[str],
    gate: EntropyGate,
    caches: dict[str, tuple[CacheFactory, CacheFactory]],
    max_new_tokens: int = 50,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """The gate with the caches of the small and of the large model made by each two factories: one row a prompt.

    `usage`, `tokens`, `fidelity` to the large model alone in full precision, the `seconds` of an untraced run, and of
    both caches together `cache_tokens`, `held_bytes` at the end (spare room included), `live_bytes`, and `peak_bytes`,
    the sum of what each held at most.
    """
    small, large, tokenizer = pair
    large_tokenizer, rouge = large_tokenizer or tokenizer, Rouge(keep_in_memory=True)
    settings = {"max_new_tokens": max_new_tokens, "large_tokenizer": large_tokenizer}

    def write(prompt: str, made: list) -> Generated:
        return gated_generate(
            *pair, prompt, gate, small_cache=lambda _: made[0], large_cache=lambda _: made[1], **settings
        )

    rows = []
    for i, prompt in enumerate(prompts):
        alone = plain_generate(large, large_tokenizer, prompt, max_new_tokens, ends=end_tokens(small, large))
        for name, factories in caches.items():
            seconds = write(prompt, [factory(model) for factory, model in zip(factories, pair, strict=False)]).seconds
            made = [factory(model) for factory, model in zip(factories, pair, strict=False)]
            kept = [each.cache if isinstance(each, PolicyDriver) else each for each in made]
            with trace_cache(kept[0]) as first, trace_cache(kept[1]) as second:
                result = write(prompt, made)
            row = {"prompt": i, "cache": name, "tokens": len(result.token_ids), "usage": result.usage}
            row |= {"fidelity": fidelity([result.text], alone.text, rouge)[0], "seconds": seconds}
            row["cache_tokens"] = sum(cache.get_seq_length() for cache in kept)
            row["peak_bytes"] = first.peak_bytes + second.peak_bytes
            row |= {"held_bytes": sum(map(stored_bytes, kept)), "live_bytes": sum(map(live_bytes, kept))}
            rows.append(row)
    return pd.DataFrame(rows)
