"""What fixed widths cost, on sampled and on real text: `python main.py quality`."""

from collections.abc import Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.evaluation.bootstrap import interval_columns
from helpers.evaluation.methods import PackedMethod
from helpers.evaluation.quality import full_precision_accuracy, measure_method, quality_row
from helpers.policies import CachedModel, FixedBits

COLUMNS = ["text", "sequences", "tokens", "store", "code_bits", "stored_bits", "kl", "kl_low", "kl_high",
           "accuracy", "accuracy_full", "accuracy_change", "accuracy_change_low", "accuracy_change_high"]  # fmt: skip

SAMPLED_METHODS = (
    PackedMethod(FixedBits(4), 1, "minmax"),
    PackedMethod(FixedBits(4), 1),
    PackedMethod(FixedBits(4), 16),
    PackedMethod(FixedBits(2), 1, "minmax"),
    PackedMethod(FixedBits(2), 1),
    PackedMethod(FixedBits(2), 16),
)
TEXT_METHODS = (
    PackedMethod(FixedBits(8)),
    PackedMethod(FixedBits(4)),
    PackedMethod(FixedBits(4), quantizer="minmax"),
    PackedMethod(FixedBits(2)),
    PackedMethod(FixedBits(2), quantizer="minmax"),
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
        cached = CachedModel(model)
        while ids.shape[1] < length:
            logits = cached.read(ids[:, -1:])[:, -1].float()
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], dim=1)
        parts.append(ids)
    return torch.cat(parts)


def quality_table(
    model: PreTrainedModel, sequences: torch.Tensor, methods: Sequence[PackedMethod], text: str, first: int = 0
) -> pd.DataFrame:
    """One row a method: mean KL and change of accuracy with 95% bootstrap intervals over sequences, and widths."""
    rows = []
    full = full_precision_accuracy(model, sequences, first)
    for method in methods:
        measured = measure_method(model, sequences, method, first)
        name = f"{method.policy.name}, block {method.block}" + ", plain min-max" * (method.quantizer == "minmax")
        row = {"text": text, "sequences": len(sequences), "tokens": sequences.shape[1], "store": name}
        row |= quality_row(measured) | {"accuracy_full": float(full.mean())}
        rows.append(row | interval_columns("accuracy_change", measured["accuracy"] - full))
    return pd.DataFrame(rows)[COLUMNS]
