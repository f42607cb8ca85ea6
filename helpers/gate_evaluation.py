"""What a gate gains and costs, on prompts: against the large model alone, the small one, and assisted generation.

Every method writes on the same prompts, up to the same length, in one interleaved run. `ROUGE` is against the
reference texts, `fidelity` is ROUGE-L against what the large model writes itself.
"""

import random
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from helpers.corpora import Article
from helpers.gate import EntropyGate, OnlineTracker, gated_generate
from helpers.gate_baselines import assisted_generate, plain_generate
from helpers.gate_reader import LARGE, SMALL, CacheFactory, Generated, end_tokens, prompt_ids
from helpers.generation import PolicyDriver
from helpers.metrics import ROUGE_TYPES, bootstrap_mean, bootstrap_ratio, rouge_scores
from helpers.stores import live_bytes

GATED, NAIVE, ASSISTED = "gated", "large, no cache", "assisted"
METHODS = (GATED, LARGE, SMALL, NAIVE, ASSISTED)


def fit_prompts(
    articles: Sequence[Article],
    template: str,
    readers: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    max_new_tokens: int,
    max_prompt_tokens: int = 1024,
) -> tuple[list[str], int]:
    """Articles as prompts, cut from the end where they would not fit any of the models, and how many were cut."""
    room = max_prompt_tokens
    for model, tokenizer in readers:
        limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None) or room
        frame = len(prompt_ids(tokenizer, template.format(article=".")))
        # Tokens at a cut may join differently than in the whole text: 8 to spare.
        room = min(room, limit - max_new_tokens - frame - 8)
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the context of the models")
    prompts, cut, tokenizer = [], 0, readers[0][1]
    for article in articles:
        ids = tokenizer(article.article, add_special_tokens=False)["input_ids"]
        text = article.article if len(ids) <= room else tokenizer.decode(ids[:room])
        prompts.append(template.format(article=text))
        cut += len(ids) > room
    return prompts, cut


def sample_articles(articles: list[Article], count: int, seed: int = 0, held_out: int = 0) -> list[list[Article]]:
    """`count` articles in seeded random order, and up to `held_out` others to correct a threshold on."""
    if not 0 < count <= len(articles):
        raise ValueError(f"count must lie between 1 and the number of articles ({len(articles)}), got {count}")
    order = random.Random(seed).sample(articles, len(articles))
    return [order[:count], order[count : count + held_out]]


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


def summarise_methods(table: pd.DataFrame) -> pd.DataFrame:
    """One row a method: mean `seconds`, `ms_per_token`, `tokens_per_second`, time to first token, ROUGE, fidelity."""
    groups = table.groupby("method", sort=False)
    summary = groups[["seconds", "first_token_seconds", *ROUGE_TYPES, "fidelity"]].mean()
    totals = groups[["seconds", "tokens"]].sum()
    summary.insert(1, "ms_per_token", 1000 * totals["seconds"] / totals["tokens"])
    summary.insert(2, "tokens_per_second", totals["tokens"] / totals["seconds"])
    return summary


def speed_against_ideal(table: pd.DataFrame, method: str = GATED) -> dict[str, float]:
    """What a gate gained in time per token, and what it could: `usage`, `cost_ratio`, `speedup`, `ideal`, `share`.

    Needs `method`, "large" and "small". `cost_ratio` c is the small model's time per token over the large
    one's, `usage` p the share of all tokens that the large one wrote, `ideal` is 1 / (c + p), `share` is the part of
    it that was reached.
    """
    ms = summarise_methods(table)["ms_per_token"]
    gated = table[table["method"] == method]
    usage = float(np.average(gated["usage"], weights=gated["tokens"]))
    cost_ratio, speedup = ms[SMALL] / ms[LARGE], ms[LARGE] / ms[method]
    ideal = 1 / (cost_ratio + usage)
    return {"usage": usage, "cost_ratio": cost_ratio, "speedup": speedup, "ideal": ideal, "share": speedup / ideal}


def compare(table: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Paired bootstrap over prompts, each (value, low, high) at 95%.

    Per method M: `speedup vs M`, ratio of mean times per token of M and the gate; against the large model
    `rougeL - large` and `fidelity`; and `usage`, the share of all tokens that the large model wrote.
    """
    wide = table.assign(per_token=table["seconds"] / table["tokens"]).pivot(index="prompt", columns="method")
    tokens = wide["tokens"][GATED]
    result = {
        f"speedup vs {method}": bootstrap_ratio(wide["per_token"][method], wide["per_token"][GATED])
        for method in table["method"].unique()
        if method != GATED
    }
    result["usage"] = bootstrap_ratio(wide["usage"][GATED] * tokens, tokens)
    result["fidelity"] = bootstrap_mean(wide["fidelity"][GATED])
    result["rougeL - large"] = bootstrap_mean(wide["rougeL"][GATED] - wide["rougeL"][LARGE])
    return result


def summarise_gates(table: pd.DataFrame, gates: dict[str, EntropyGate]) -> pd.DataFrame:
    """One row a gate of `evaluate_gate`: `signal, threshold, usage, fidelity`, ROUGE, `ms_per_token, speedup`, ideal.

    `usage`, `fidelity`, `rougeL` and `speedup` carry 95% bootstrap intervals over prompts (`_low`, `_high`).
    """
    ms, rows = summarise_methods(table)["ms_per_token"], []
    large = table[table["method"] == LARGE].set_index("prompt")
    for name, gate in gates.items():
        own = table[table["method"] == name].set_index("prompt")
        speed = speed_against_ideal(table, name)
        intervals = {
            "usage": bootstrap_ratio(own["usage"] * own["tokens"], own["tokens"]),
            "speedup": bootstrap_ratio(large["seconds"] / large["tokens"], own["seconds"] / own["tokens"]),
            "fidelity": bootstrap_mean(own["fidelity"]),
            "rougeL": bootstrap_mean(own["rougeL"]),
        }
        bounds = {
            f"{of}_{side}": found[at] for of, found in intervals.items() for at, side in ((1, "low"), (2, "high"))
        }
        rows.append(
            {"signal": gate.signal, "threshold": gate.threshold}
            | speed
            | own[["fidelity", *ROUGE_TYPES]].mean().to_dict()
            | bounds
            | {"ms_per_token": ms[name]}
        )
    return pd.DataFrame(rows, index=pd.Index(gates, name="gate"))


def evaluate_large_caches(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    gate: EntropyGate,
    caches: dict[str, CacheFactory],
    max_new_tokens: int = 50,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """The gate with the large model's cache made by each factory: one row a prompt and cache.

    `usage`, `tokens`, `fidelity` to the large model alone in full precision, `cache_tokens` and `live_bytes` of the
    large model's cache at the end.
    """
    large_tokenizer, ends = large_tokenizer or tokenizer, end_tokens(small, large)
    settings = {"max_new_tokens": max_new_tokens, "large_tokenizer": large_tokenizer}
    made: list[Cache | PolicyDriver] = []
    rows = []
    for i, prompt in enumerate(prompts):
        alone = plain_generate(large, large_tokenizer, prompt, max_new_tokens, ends=ends).text
        for name, factory in caches.items():

            def keep(model, factory=factory):
                made[:] = [factory(model)]
                return made[0]

            result = gated_generate(small, large, tokenizer, prompt, gate, large_cache=keep, **settings)
            cache = made[0].cache if isinstance(made[0], PolicyDriver) else made[0]
            fidelity = float(rouge_scores([result.text], [alone])["rougeL"][0])
            row = {"prompt": i, "cache": name, "tokens": len(result.token_ids), "usage": result.usage}
            row |= {"fidelity": fidelity, "cache_tokens": cache.get_seq_length(), "live_bytes": live_bytes(cache)}
            rows.append(row)
    return pd.DataFrame(rows)
