"""What a method costs in quality: KL to full precision and next-token accuracy, block by block."""

import numpy as np
import torch
from transformers import PreTrainedModel

from helpers.cache import WIDTHS, code_bits, live_bytes, stored_bytes
from helpers.cache.arguments import head_dim
from helpers.evaluation.bootstrap import interval_columns
from helpers.evaluation.methods import Method
from helpers.evaluation.metrics import kl_divergence, next_token_hits
from helpers.io.processes import spread
from helpers.policies import score_blocks
from helpers.policies.features import log_probabilities, surprisal_of

SIZES = ("code_bits", "stored_bits", "held_bytes", "live_bytes")
KEPT_BYTES = 4 * 2**30  # of full-precision logits that are kept for the next method


@torch.no_grad()
def measure_method(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    method: Method,
    first: int = 0,
    batch: int = 25,
    references: dict[int, torch.Tensor] | None = None,
) -> dict[str, object]:
    """Quality of one method on `sequences` `[count, tokens]`, over the positions from `first` on.

    Several processes (see `helpers.io.processes`) share the batches; all get the same result. In `references` the
    full-precision logits are kept for other methods on the same sequences, as far as there is room.
    Returns per-sequence arrays `kl` (nats to full precision), `accuracy` and `loss` (nats per token); averages, of one
    sequence: `held_bytes`, the most that the cache owned while the text was read, spare room included; `stored_bits`,
    these in bits a number of the whole sequence; `code_bits` and `live_bytes` of the cache as the last token sees it,
    its tail counted; and `widths`, the shares of 2, 4, 8 and 16 bits among the widths chosen at commit.
    """
    batches = sequences.split(batch)
    parts = spread(
        lambda number: _measure_batch(model, batches[number], method, number, first, references),
        list(map(len, batches)),
        method.name,
    )
    arrays = {name: np.array([x for part in parts for x in part[name]]) for name in ("kl", "accuracy", "loss")}
    means = {name: float(np.mean([part[name] for part in parts])) for name in SIZES}
    widths = sum(part["widths"] for part in parts)
    return {**arrays, **means, "widths": tuple(widths / max(widths.sum(), 1))}


def _reference(
    model: PreTrainedModel, rows: torch.Tensor, number: int, first: int, known: dict[int, torch.Tensor] | None
) -> torch.Tensor:
    """Full-precision logits of batch `number` from position `first` on, `[rows, tokens, vocabulary]`."""
    known = {} if known is None else known
    if number in known:
        return known[number]
    logits = model(input_ids=rows, logits_to_keep=rows.shape[1] - first).logits
    if logits.nbytes + sum(each.nbytes for each in known.values()) <= KEPT_BYTES:
        known[number] = logits
    return logits


def _measure_batch(
    model: PreTrainedModel,
    rows: torch.Tensor,
    method: Method,
    number: int,
    first: int,
    references: dict[int, torch.Tensor] | None,
) -> dict:
    """`measure_method` for the rows of batch `number`; `widths` are counts."""
    reference = _reference(model, rows, number, first, references)
    cached = method.open(model, number)
    kl, hits, losses, held = [], [], [], 0
    for span, logits in score_blocks(cached, rows, method.block):
        if span.stop > first:
            start = max(span.start, first)
            logits = logits[:, start - span.start :]
            kl.append(kl_divergence(reference[:, start - first : span.stop - first], logits))
            following = rows[:, start + 1 : span.stop + 1]
            logits = logits[:, : following.shape[1]]
            hits.append(next_token_hits(logits, following))
            losses.append(surprisal_of(log_probabilities(logits), following))
        held = max(held, stored_bytes(cached.cache))
        now = code_bits(cached.cache), live_bytes(cached.cache)  # before this block is committed
    measures = (("kl", kl), ("accuracy", hits), ("loss", losses))
    result: dict = {name: torch.cat(parts, 1).double().mean(1).tolist() for name, parts in measures}
    result["code_bits"], live = now
    result["stored_bits"] = 8 * held / (2 * rows.numel() * _numbers_per_token(model))
    result["held_bytes"], result["live_bytes"] = held / len(rows), live / len(rows)
    result["widths"] = np.zeros(len(WIDTHS))
    if cached.driver is not None and cached.driver.chosen:
        chosen = torch.cat(cached.driver.chosen, dim=1)
        result["widths"] += [(chosen == bits).sum().item() for bits in WIDTHS]
    return result


def _numbers_per_token(model: PreTrainedModel) -> int:
    """Key (or value) numbers that a token has in all layers."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers * heads * head_dim(config)


def quality_row(measured: dict) -> dict[str, float]:
    """What `measure_method` found as columns of a table: means over sequences, KL with its 95% interval."""
    return {
        **{name: measured[name] for name in SIZES},
        "accuracy": float(measured["accuracy"].mean()),
        "perplexity": float(np.exp(measured["loss"].mean())),
        **interval_columns("kl", measured["kl"]),
    }


def full_precision_accuracy(model: PreTrainedModel, sequences: torch.Tensor, first: int, batch: int = 25) -> np.ndarray:
    """Next-token accuracy of each sequence in full precision, over the positions from `first` on."""
    accuracies = []
    with torch.no_grad():
        for rows in sequences.split(batch):
            hits = next_token_hits(model(input_ids=rows).logits[:, first:-1], rows[:, first + 1 :])
            accuracies += hits.float().mean(1).tolist()
    return np.array(accuracies)
