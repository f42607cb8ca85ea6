"""The gate with packed caches under its large model."""

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from helpers.cache.accounting import live_bytes
from helpers.evaluation.rouge import rouge_scores
from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.gate.prompts import end_tokens
from helpers.gate.reader import CacheFactory
from helpers.gate.study.baselines import plain_generate
from helpers.policies.driver import PolicyDriver


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
