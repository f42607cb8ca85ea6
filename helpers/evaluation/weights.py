"""What weights at 8 bits cost and gain: `python main.py weights`, `load_model(..., weights="int8")` on a CPU.

KL and next-token accuracy on texts, multiple choice, and time, all against the model in full precision, paired.
"""

import statistics
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.evaluation.bootstrap import bootstrap_mean, bootstrap_ratio
from helpers.evaluation.metrics import kl_divergence, next_token_hits
from helpers.evaluation.multiple_choice import score_items
from helpers.models import MultipleChoice
from helpers.policies import CachedModel
from helpers.policies.decoding import timed

MEASURES = ("kl", "accuracy change", "acc change", "acc_norm change", "step time ratio", "prompt time ratio")


@torch.no_grad()
def compare_on_text(full: PreTrainedModel, other: PreTrainedModel, sequences: torch.Tensor) -> pd.DataFrame:
    """One row a sequence `[tokens]`: mean `kl` (nats) and change of next-token `accuracy` over its second half."""
    rows = []
    for ids in tqdm(sequences, desc="texts", leave=False):
        half = slice(len(ids) // 2, len(ids) - 1)
        logits, changed = (model(input_ids=ids[None], use_cache=False).logits[:, half] for model in (full, other))
        targets = ids[None, half.start + 1 :]
        hits = [next_token_hits(each, targets).double().mean().item() for each in (logits, changed)]
        rows.append({"kl": kl_divergence(logits, changed).mean().item(), "accuracy": hits[1] - hits[0]})
    return pd.DataFrame(rows)


def time_in_turn(models: Sequence[PreTrainedModel], ids: torch.Tensor, rounds: int = 12, steps: int = 4) -> np.ndarray:
    """Milliseconds `[2, models, rounds]` of a decode step after a prompt `[tokens]`, and of reading that prompt.

    The models take turns; a step is the median of `steps`.
    """
    times = np.empty((2, len(models), rounds))
    for turn in range(-1, rounds):  # the first is for warming up
        for number, model in enumerate(models):
            cached = CachedModel(model)
            _, prompt = timed(ids.device, cached.read, ids[None], 1)
            step = statistics.median(timed(ids.device, cached.read, ids[None, -1:], 1)[1] for _ in range(steps))
            if turn >= 0:
                times[:, number, turn] = step, prompt
    return times


def weights_table(
    full: PreTrainedModel,
    other: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: torch.Tensor,
    items: Sequence[MultipleChoice],
) -> pd.DataFrame:
    """One row a measure of `MEASURES`: `value`, its 95% interval, what it was in `full` precision, and `n`.

    Ratios of time are those of `other` to `full`: below 1 is faster.
    """
    text = compare_on_text(full, other, sequences)
    rows = [("kl", *bootstrap_mean(text["kl"]), np.nan, len(text))]
    rows.append(("accuracy change", *bootstrap_mean(text["accuracy"]), np.nan, len(text)))
    if items:
        before, after = (score_items(model, tokenizer, items) for model in (full, other))
        for name in ("acc", "acc_norm"):
            change = bootstrap_mean(after[name] - before[name])
            rows.append((f"{name} change", *change, before[name].mean(), len(items)))
    times = time_in_turn((full, other), sequences[0, : sequences.shape[1] // 4])
    for name, of in zip(MEASURES[-2:], times, strict=True):
        rows.append((name, *bootstrap_ratio(of[1], of[0]), np.median(of[0]), of.shape[1]))
    return pd.DataFrame(rows, columns=["measure", "value", "low", "high", "full", "n"])
