"""The gate with packed caches under its large model."""

import pandas as pd
from transformers import PreTrainedTokenizerBase

from helpers.cache import live_bytes, stored_bytes
from helpers.evaluation.rouge import Rouge
from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.gate.prompts import end_tokens
from helpers.gate.reading import CacheFactory
from helpers.gate.study.baselines import Pair, plain_generate
from helpers.gate.study.evaluation import fidelity
from helpers.policies import PolicyDriver


def evaluate_large_caches(
    pair: Pair,
    prompts: list[str],
    gate: EntropyGate,
    caches: dict[str, CacheFactory],
    max_new_tokens: int = 50,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """The gate with the large model's cache made by each factory: one row a prompt and cache.

    `usage`, `tokens`, `fidelity` to the large model alone in full precision, and of the large model's cache at the end
    `cache_tokens`, `held_bytes` (spare room included) and `live_bytes`.
    """
    small, large, tokenizer = pair
    large_tokenizer, rouge = large_tokenizer or tokenizer, Rouge(keep_in_memory=True)
    settings = {"max_new_tokens": max_new_tokens, "large_tokenizer": large_tokenizer}
    rows = []
    for i, prompt in enumerate(prompts):
        alone = plain_generate(large, large_tokenizer, prompt, max_new_tokens, ends=end_tokens(small, large))
        for name, factory in caches.items():
            made = factory(large)
            result = gated_generate(*pair, prompt, gate, large_cache=lambda model, made=made: made, **settings)
            cache = made.cache if isinstance(made, PolicyDriver) else made
            row = {"prompt": i, "cache": name, "tokens": len(result.token_ids), "usage": result.usage}
            row |= {"fidelity": fidelity([result.text], alone.text, rouge)[0], "cache_tokens": cache.get_seq_length()}
            rows.append(row | {"held_bytes": stored_bytes(cache), "live_bytes": live_bytes(cache)})
    return pd.DataFrame(rows)
