"""Memory and time over the length of a text."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.cache.accounting import code_bits, live_bytes, stored_bytes
from helpers.cache.kv_cache import PackedKVCache
from helpers.evaluation.methods import Method
from helpers.policies.decoding import decode


@torch.no_grad()
def against_length(
    model: PreTrainedModel, stores: Sequence[Method], lengths: Sequence[int], steps: int = 16, seed: int = 0
) -> pd.DataFrame:
    """Memory and latency after contexts of the given lengths, of random tokens: one row a store and length.

    Columns `method`, `tokens`, `live_bytes`, `stored_bytes`, `code_bits`, `latency_ms` (mean step, commits included).
    What is predicted is meaningless beyond the model's own context; bytes and times are not.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (1, max(lengths) + steps), generator=generator).to(model.device)
    rows = []
    for length in tqdm(lengths, desc="lengths", leave=False):
        for turn in range(2):  # the first is a warm-up
            for store in stores:
                cache, driver = store.open(model)
                logits = model(input_ids=ids[:, :length], cache=cache).logits
                if driver is not None:
                    driver.observe(ids[:, :length], logits)
                sizes = {"live_bytes": live_bytes(cache), "stored_bytes": stored_bytes(cache)}
                sizes["code_bits"] = code_bits(cache)
                result = decode(model, ids[:, length : length + steps], cache, driver, forced=True)
                if turn:
                    latency = float(np.mean(result.latency_ms))
                    rows.append({"method": store.name, "tokens": length, **sizes, "latency_ms": latency})
    return pd.DataFrame(rows)


@torch.no_grad()
def follow_text(model: PreTrainedModel, ids: torch.Tensor, stores: dict[str, list[Method]]) -> pd.DataFrame:
    """Read `ids` `[tokens]` block by block: after each block, bytes held and the width of every token so far.

    `stores`: group -> stores. Columns `method`, `group`, `tokens`, `live_bytes`, `stored_bytes`, `bits` (a list).
    """
    rows = []
    for group, members in stores.items():
        for store in members:
            cache, driver = store.open(model)
            for at in range(0, len(ids), store.block):
                part = ids[None, at : at + store.block]
                logits = model(input_ids=part, cache=cache).logits
                if driver is not None:
                    driver.observe(part, logits)
                packed = isinstance(cache, PackedKVCache)
                bits = cache.token_bits()[0].tolist() if packed else [16.0] * (at + part.shape[1])
                sizes = {"live_bytes": live_bytes(cache), "stored_bytes": stored_bytes(cache)}
                rows.append({"method": store.name, "group": group, "tokens": len(bits), **sizes, "bits": bits})
    return pd.DataFrame(rows)
