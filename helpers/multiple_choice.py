"""Multiple choice as HellaSwag scores it: the ending that the model finds most likely after the context.

Two readings of "most likely", as in the Language Model Evaluation Harness: the sum of the log-probabilities of an
ending's tokens (`acc`), and that sum over the ending's length in bytes (`acc_norm`).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.corpora import MultipleChoice


@torch.no_grad()
def ending_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, item: MultipleChoice
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (nats) of each ending after the context, and each ending's length in bytes.

    An ending's tokens are those that follow the context's in the tokens of both together; a text longer than the
    model's context loses its beginning. Raises `ValueError` for an item with an empty context or ending.
    """
    if not item.context.strip() or not all(ending.strip() for ending in item.endings):
        raise ValueError(f"a multiple-choice item needs a context and endings, got {item}")
    limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    prefix = len(tokenizer(item.context, verbose=False)["input_ids"])
    rows = [tokenizer(f"{item.context} {e}", verbose=False)["input_ids"] for e in item.endings]
    scored = [len(row) - prefix for row in rows]
    rows = [row[-limit:] for row in rows]
    width = max(map(len, rows))
    # Padding on the right: under causal attention no token ever sees it.
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    log_p = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
    sums = []
    for row, (tokens, count) in enumerate(zip(rows, scored, strict=True)):
        at = torch.arange(len(tokens) - count, len(tokens), device=model.device)
        sums.append(log_p[row, at - 1, ids[row, at]].sum().item())
    return np.array(sums), np.array([len(ending.encode()) for ending in item.endings])


def score_items(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[MultipleChoice]
) -> pd.DataFrame:
    """One row an item: `acc` and `acc_norm`, each 1.0 where the true ending came out on top."""
    rows = []
    for item in tqdm(items, desc="multiple choice", leave=False):
        sums, lengths = ending_log_likelihoods(model, tokenizer, item)
        rows.append(
            {
                "acc": float(sums.argmax() == item.label),
                "acc_norm": float((sums / lengths).argmax() == item.label),
            }
        )
    return pd.DataFrame(rows)
