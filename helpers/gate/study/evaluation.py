"""What a gate gains and costs, on prompts: against the large model alone, the small one, and assisted generation.

Every method writes on the same prompts, up to the same length, in one interleaved run. `ROUGE` is against the
reference texts, `fidelity` is ROUGE-L against what the large model writes itself.
"""

import statistics
from collections.abc import Callable, Sequence

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.rouge import rouge_scores
from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.generation import gated_generate
from helpers.gate.prompts import end_tokens
from helpers.gate.study.baselines import assisted_generate, plain_generate
from helpers.gate.text import LARGE, SMALL, Generated

GATED, NAIVE, ASSISTED = "gated", "large, no cache", "assisted"


METHODS = (GATED, LARGE, SMALL, NAIVE, ASSISTED)


def evaluate_gate(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
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
    methods = [name for method in methods for name in (gates if method == GATED else [method])]
    large_tokenizer, ends = large_tokenizer or tokenizer, end_tokens(small, large)
    plain = {"stop_at_end": stop_at_end, "ends": ends}

    def run(method: str, prompt: str, tokens: int) -> Generated:
        if method in gates:
            settings = {"large_tokenizer": large_tokenizer, "stop_at_end": stop_at_end}
            return gated_generate(small, large, tokenizer, prompt, gates[method], tokens, **settings)
        if method == SMALL:
            return plain_generate(small, tokenizer, prompt, tokens, author=SMALL, **plain)
        if method == ASSISTED:
            return assisted_generate(small, large, large_tokenizer, prompt, tokens, stop_at_end)
        return plain_generate(large, large_tokenizer, prompt, tokens, use_cache=method == LARGE, **plain)

    for method in methods:
        if isinstance(gates.get(method), OnlineTracker):
            continue  # it must not learn from the warm-up
        run(method, prompts[0], min(8, max_new_tokens))
    tables = []
    for i, (prompt, reference) in enumerate(zip(prompts, references, strict=True)):
        results: dict[str, list[Generated]] = {method: [] for method in methods}
        for turn in range(repeats):
            at = (i + turn) % len(methods)
            for method in (*methods[at:], *methods[:at]):
                results[method].append(run(method, prompt, max_new_tokens))
        rows = [_row(i, method, results[method], reference, results.get(LARGE)) for method in methods]
        tables.append(pd.DataFrame(rows))
        if on_prompt:
            on_prompt(tables[-1])
    return pd.concat(tables, ignore_index=True)


def _row(prompt: int, method: str, results: list[Generated], reference: str, large: list[Generated] | None) -> dict:
    last = results[-1]
    scores = {name: float(score[0]) for name, score in rouge_scores([last.text], [reference]).items()}
    fidelity, prefix = float("nan"), float("nan")
    if large:
        fidelity = float(rouge_scores([last.text], [large[-1].text])["rougeL"][0])
        same = [own == theirs for own, theirs in zip(last.token_ids, large[-1].token_ids, strict=False)]
        prefix = same.index(False) if False in same else len(same)
    return {
        "prompt": prompt,
        "method": method,
        "tokens": len(last.token_ids),
        "seconds": statistics.median(result.seconds for result in results),
        "first_token_seconds": statistics.median(result.first_token_seconds for result in results),
        "usage": last.usage,
        "large_calls": last.large_calls,
        "rollbacks": last.rollbacks,
        "discarded": last.discarded,
        **scores,
        "fidelity": fidelity,
        "shared_prefix": prefix,
        "text": last.text,
    }
