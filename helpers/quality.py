"""What packing costs in quality: KL to full precision and next-token accuracy of fixed widths, block by block.

    python main.py quality --model MODEL --texts STORIES

Two kinds of text: sequences that the model itself samples at temperature 1 (its own distribution, harder), and the
last tenth of a story file, packed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from helpers.generation import PolicyDriver, score_blocks
from helpers.kv_cache import PackedKVCache
from helpers.metrics import bootstrap_mean, kl_divergence, next_token_hits
from helpers.policies import FixedBits, Policy


@dataclass(frozen=True)
class Store:
    """One way to store the cache: a policy, a block and a quantizer."""

    policy: Policy
    block: int = 16
    quantizer: str = "rotated"

    @property
    def name(self) -> str:
        plain = ", plain min-max" if self.quantizer == "minmax" else ""
        return f"{self.policy.name}, block {self.block}{plain}"


SAMPLED_STORES = (
    Store(FixedBits(4), 1, "minmax"),
    Store(FixedBits(4), 1),
    Store(FixedBits(4), 16),
    Store(FixedBits(2), 1, "minmax"),
    Store(FixedBits(2), 1),
    Store(FixedBits(2), 16),
)
TEXT_STORES = (
    Store(FixedBits(8)),
    Store(FixedBits(4)),
    Store(FixedBits(4), quantizer="minmax"),
    Store(FixedBits(2)),
    Store(FixedBits(2), quantizer="minmax"),
)


@torch.no_grad()
def sample_sequences(model: PreTrainedModel, count: int, length: int, seed: int = 0, batch: int = 50) -> torch.Tensor:
    """`count` sequences `[count, length]` sampled from the model at temperature 1, from its beginning-of-text token.

    The end of a text is just another token: what comes after it is the next text.
    """
    if model.config.bos_token_id is None:
        raise ValueError("the model has no beginning-of-text token (config.bos_token_id) to sample from")
    generator = torch.Generator(device=model.device).manual_seed(seed)
    parts = []
    for start in tqdm(range(0, count, batch), desc="sampling", leave=False):
        rows = min(batch, count - start)
        ids = torch.full((rows, 1), model.config.bos_token_id, device=model.device)
        cache = DynamicCache(config=model.config)
        while ids.shape[1] < length:
            logits = model(input_ids=ids[:, -1:], past_key_values=cache).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        parts.append(ids)
    return torch.cat(parts)


@torch.no_grad()
def measure_store(
    model: PreTrainedModel, sequences: torch.Tensor, store: Store, first: int = 0, batch: int = 25
) -> dict[str, object]:
    """KL and accuracy of one store on `sequences` `[count, tokens]`, over the positions from `first` on.

    Returns per-sequence arrays `kl` (nats) and `accuracy`, and the averages `code_bits` and `bits_per_element` of
    the cache as the last token sees it, its tail counted.
    """
    results: dict[str, list] = {"kl": [], "accuracy": [], "code_bits": [], "bits_per_element": []}
    for rows in tqdm(sequences.split(batch), desc=store.name, leave=False):
        reference = model(input_ids=rows).logits
        cache = PackedKVCache(model.config, block=store.block, quantizer=store.quantizer)
        driver = PolicyDriver(model, cache, store.policy)
        kl, hits = [], []
        for span, logits in score_blocks(model, rows, cache, driver, store.block):
            kl.append(kl_divergence(reference[:, span], logits))
            following = rows[:, span.start + 1 : span.stop + 1]
            hits.append(next_token_hits(logits[:, : following.shape[1]], following))
            widths = cache.code_bits(), cache.bits_per_element()
        results["kl"] += torch.cat(kl, 1)[:, first:].mean(1).tolist()
        results["accuracy"] += torch.cat(hits, 1)[:, first:].float().mean(1).tolist()
        results["code_bits"].append(widths[0])
        results["bits_per_element"].append(widths[1])
    means = {name: float(np.mean(results[name])) for name in ("code_bits", "bits_per_element")}
    return {"kl": np.array(results["kl"]), "accuracy": np.array(results["accuracy"]), **means}


def full_precision_accuracy(model: PreTrainedModel, sequences: torch.Tensor, first: int, batch: int = 25) -> np.ndarray:
    """Next-token accuracy of each sequence in full precision, over the positions from `first` on."""
    accuracies = []
    with torch.no_grad():
        for rows in sequences.split(batch):
            hits = next_token_hits(model(input_ids=rows).logits[:, first:-1], rows[:, first + 1 :])
            accuracies += hits.float().mean(1).tolist()
    return np.array(accuracies)


def quality_table(
    model: PreTrainedModel, sequences: torch.Tensor, stores: Sequence[Store], text: str, first: int = 0
) -> pd.DataFrame:
    """One row a store: mean KL and accuracy with 95% bootstrap intervals over sequences, and widths."""
    rows = []
    full = full_precision_accuracy(model, sequences, first)
    for store in stores:
        measured = measure_store(model, sequences, store, first)
        kl, kl_low, kl_high = bootstrap_mean(measured["kl"])
        loss, loss_low, loss_high = bootstrap_mean(measured["accuracy"] - full)
        rows.append(
            {
                "text": text,
                "sequences": len(sequences),
                "tokens": sequences.shape[1],
                "store": store.name,
                "code_bits": measured["code_bits"],
                "bits_per_element": measured["bits_per_element"],
                "kl": kl,
                "kl_low": kl_low,
                "kl_high": kl_high,
                "accuracy": float(measured["accuracy"].mean()),
                "accuracy_full": float(full.mean()),
                "accuracy_change": loss,
                "accuracy_change_low": loss_low,
                "accuracy_change_high": loss_high,
            }
        )
    return pd.DataFrame(rows)
