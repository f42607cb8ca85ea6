"""Memory and time over the length of a text."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from helpers.cache import PackedKVCache, code_bits, live_bytes, stored_bytes
from helpers.evaluation.memory import deployment_peak
from helpers.evaluation.methods import Group, Method
from helpers.policies import decode


def against_length(
    model: PreTrainedModel, methods: Sequence[Method], lengths: Sequence[int], steps: int = 16, seed: int = 0
) -> pd.DataFrame:
    """Memory and latency after contexts of the given lengths, of random tokens: one row a method and length.

    Columns `method`, `tokens`; `peak_bytes` (traced alike for every cache, reading of the prompt included);
    `held_bytes`, `live_bytes` and `code_bits` as the last decoded token leaves the cache; `latency_ms` (mean step,
    commits included).
    What is predicted is meaningless beyond the model's own context; bytes and times are not.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (1, max(lengths) + steps), generator=generator).to(model.device)
    rows = []
    for length in tqdm(lengths, desc="lengths", leave=False):
        for turn in range(2):  # the first is a warm-up
            for method in methods:
                cached = method.open(model)
                cached.read(ids[:, :length], keep=1)
                latency_ms = decode(cached, ids[:, length : length + steps], forced=True).latency_ms
                if not turn:
                    continue
                row = {"method": method.name, "tokens": length}
                row["peak_bytes"] = deployment_peak(model, ids, method, length, steps)
                row |= {**_sizes(cached.cache), "code_bits": code_bits(cached.cache)}
                rows.append({**row, "latency_ms": float(np.mean(latency_ms))})
    return pd.DataFrame(rows)


def follow_text(model: PreTrainedModel, ids: torch.Tensor, groups: Sequence[Group], every: int = 64) -> pd.DataFrame:
    """Read `ids` `[tokens]` block by block: after each block, bytes held and the width of every token so far.

    Columns `method`, `group`, `tokens`, `held_bytes`, `live_bytes`, `bits` (a list), and at each multiple of `every`
    tokens `peak_bytes` (else NaN): in deployment, so many tokens as a prompt but for a last block that is decoded.
    """
    rows = []
    for group in groups:
        for method in group.methods:
            cached = method.open(model)
            for part in ids[None].split(method.block, dim=1):
                cached.read(part)
                packed = isinstance(cached.cache, PackedKVCache)
                bits = cached.cache.token_bits()[0].tolist() if packed else [16.0] * cached.length
                tokens = len(bits)
                row = {"method": method.name, "group": group.name, "tokens": tokens, "peak_bytes": float("nan")}
                if tokens % every == 0 and tokens > method.block:
                    row["peak_bytes"] = deployment_peak(model, ids[None], method, tokens - method.block, method.block)
                rows.append({**row, **_sizes(cached.cache), "bits": bits})
    return pd.DataFrame(rows)


def _sizes(cache: Cache) -> dict[str, int]:
    return {"held_bytes": stored_bytes(cache), "live_bytes": live_bytes(cache)}
