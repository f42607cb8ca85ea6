"""Multiple choice as HellaSwag scores it: the ending that the model finds most likely after the context.

Two readings of "most likely", as in the Language Model Evaluation Harness: the sum of the log-probabilities of an
ending's tokens (`acc`), and that sum over the ending's length in bytes (`acc_norm`).
"""

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import QuantizedCache

from helpers.evaluation.methods import Method
from helpers.io.processes import spread
from helpers.models import MultipleChoice
from helpers.policies import CachedModel
from helpers.policies.features import log_probabilities, surprisal_of


@torch.no_grad()
def ending_log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    item: MultipleChoice,
    method: Method | None = None,
    text: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihood (nats) of each ending after the context, and each ending's length in bytes.

    Without `method`, one full-precision forward. With it, the context is read and committed to the cache first, and a
    second pass over the endings reads what the cache made of it: a cache's first forward sees nothing quantized. An
    ending's tokens are those that follow the context's in the tokens of both together; a text longer than the model's
    context loses its beginning. Raises `ValueError` for an item with an empty context or ending.
    """
    if not item.context.strip() or not all(ending.strip() for ending in item.endings):
        raise ValueError(f"a multiple-choice item needs a context and endings, got {item}")
    limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    context = tokenizer(item.context, verbose=False)["input_ids"]
    rows = [tokenizer(f"{item.context} {e}", verbose=False)["input_ids"][len(context) :] for e in item.endings]
    context = context[-(limit - max(map(len, rows))) :]
    width = max(map(len, rows))
    # Padding on the right: under causal attention no token ever sees it.
    endings = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    read = torch.tensor([context], device=model.device)
    if method is None:
        ids = torch.cat([read.expand(len(rows), -1), endings], dim=1)
        logits = model(input_ids=ids).logits[:, len(context) - 1 : -1]
    else:
        cached = method.open(model, text)
        first = cached.read(read, keep=1)
        logits = torch.cat([first.expand(len(rows), -1, -1), read_endings(cached, endings)], dim=1)
    log_p = -surprisal_of(log_probabilities(logits), endings)
    sums = [log_p[number, : len(row)].sum().item() for number, row in enumerate(rows)]
    return np.array(sums), np.array([len(ending.encode()) for ending in item.endings])


def read_endings(cached: CachedModel, endings: torch.Tensor) -> torch.Tensor:
    """Logits `[endings, width - 1, vocabulary]` at all but the last token of each ending, after the cached context."""
    model, cache, ids = cached.model, cached.cache, endings[:, :-1]
    if not ids.shape[1]:
        return endings.new_zeros(len(ids), 0, model.config.vocab_size, dtype=model.dtype)
    if isinstance(cache, QuantizedCache):  # its rows cannot be repeated, but an update leaves old tensors alone
        parts = []
        for row in ids:
            branch = copy.copy(cache)
            branch.layers = [copy.copy(layer) for layer in cache.layers]
            parts.append(CachedModel(model, branch).read(row[None]))
        return torch.cat(parts)
    cache.batch_repeat_interleave(len(ids))
    return cached.forward(ids)


def score_items(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[MultipleChoice],
    method: Method | None = None,
) -> pd.DataFrame:
    """One row an item: `acc` and `acc_norm`, each 1.0 where the true ending came out on top.

    With `method`, contexts are read through its cache (see `ending_log_likelihoods`). Several processes (see
    `helpers.io.processes`) share the items; all get the same table.
    """

    def score(number: int) -> dict[str, float]:
        label = items[number].label
        sums, lengths = ending_log_likelihoods(model, tokenizer, items[number], method, number)
        return {"acc": float(sums.argmax() == label), "acc_norm": float((sums / lengths).argmax() == label)}

    return pd.DataFrame(spread(score, [len(item.context) for item in items], "multiple choice"))
