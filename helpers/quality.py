"""What packing costs in quality: KL to full precision and next-token accuracy of fixed widths, block by block.

    python main.py quality --model MODEL --texts STORIES

Two kinds of text: sequences that the model itself samples at temperature 1 (its own distribution, harder), and the
last tenth of a story file, packed.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from helpers.features import surprisal
from helpers.generation import score_blocks
from helpers.metrics import bootstrap_mean, kl_divergence, next_token_hits
from helpers.policies import FixedBits
from helpers.processes import spread
from helpers.quantization import WIDTHS
from helpers.stores import AnyStore, Store, code_bits, live_bytes, stored_bytes

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
            logits = model(input_ids=ids[:, -1:], cache=cache).logits[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        parts.append(ids)
    return torch.cat(parts)


@torch.no_grad()
def measure_store(
    model: PreTrainedModel, sequences: torch.Tensor, store: AnyStore, first: int = 0, batch: int = 25
) -> dict[str, object]:
    """Quality of one store on `sequences` `[count, tokens]`, over the positions from `first` on.

    Several processes (see `helpers.processes`) share the batches; all get the same result.
    Returns per-sequence arrays `kl` (nats to full precision), `accuracy` and `loss` (nats per token); the averages
    `code_bits`, `bits_per_element` and `live_bytes` (of one sequence) of the cache as the last token sees it, its tail
    counted; `peak_bytes`, the most that one sequence ever held with spare capacity; and `widths`, the shares of 2,
    4, 8 and 16 bits among the widths chosen at commit.
    """
    batches = sequences.split(batch)
    parts = spread(
        lambda number: _measure_batch(model, batches[number], store, number, first), list(map(len, batches)), store.name
    )
    arrays = {name: np.array([x for part in parts for x in part[name]]) for name in ("kl", "accuracy", "loss")}
    held = ("code_bits", "bits_per_element", "live_bytes", "peak_bytes")
    means = {name: float(np.mean([part[name] for part in parts])) for name in held}
    widths = sum(part["widths"] for part in parts)
    return {**arrays, **means, "widths": tuple(widths / max(widths.sum(), 1))}


def _measure_batch(model: PreTrainedModel, rows: torch.Tensor, store: AnyStore, number: int, first: int) -> dict:
    """`measure_store` for the rows of batch `number`; `widths` are counts."""
    reference = model(input_ids=rows).logits
    cache, driver = store.open(model, number)
    kl, hits, losses, peak = [], [], [], 0
    for span, logits in score_blocks(model, rows, cache, driver, store.block):
        kl.append(kl_divergence(reference[:, span], logits))
        following = rows[:, span.start + 1 : span.stop + 1]
        logits = logits[:, : following.shape[1]]
        hits.append(next_token_hits(logits, following))
        losses.append(surprisal(logits, following))
        peak = max(peak, stored_bytes(cache))
        now = code_bits(cache), live_bytes(cache)  # before this block is committed
    measures = (("kl", kl), ("accuracy", hits), ("loss", losses))
    result: dict = {name: torch.cat(parts, 1)[:, first:].double().mean(1).tolist() for name, parts in measures}
    result["code_bits"], live = now
    result["bits_per_element"] = 8 * live / (2 * rows.numel() * _numbers_per_token(model))
    result["live_bytes"], result["peak_bytes"] = live / len(rows), peak / len(rows)
    result["widths"] = np.zeros(len(WIDTHS))
    if driver is not None and driver.chosen:
        chosen = torch.cat([c.cpu() for c in driver.chosen], dim=1)
        result["widths"] += [(chosen == bits).sum().item() for bits in WIDTHS]
    return result


def _numbers_per_token(model: PreTrainedModel) -> int:
    """Key (or value) numbers that a token has in all layers."""
    config = model.config.get_text_config(decoder=True)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers * heads * head_dim


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
                "store": f"{store.policy.name}, block {store.block}"
                + ", plain min-max" * (store.quantizer == "minmax"),
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
