"""Training the networks that choose a token's width at commit: `imitation`, and `commit` itself.

`imitation` is the assignment's own controller: from entropy, rarity and attention variance it copies what the entropy
rule chose. `commit` learns from more features which width is worth its bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from helpers.cache import WIDTHS
from helpers.policies.learned import COMMIT_FEATURES, IMITATION_FEATURES
from helpers.policies.network import Network
from helpers.training.allocation import rate_table
from helpers.training.costs import COST_COLUMNS
from helpers.training.fitting import History, fit_network, split_texts


@dataclass(frozen=True)
class LossWeights:
    """Weights of the commit loss `a * CE + b * expected cost + c * expected quality loss`.

    Cost is the width over 16; quality loss is the rise of KL over its mean at 2 bits.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0

    def __post_init__(self):
        values = (self.a, self.b, self.c)
        if min(values) < 0 or not any(values) or not np.isfinite(values).all():
            raise ValueError(f"loss weights must be non-negative and not all zero, got {values}")


def commit_loss(
    outputs: torch.Tensor, labels: torch.Tensor, quality: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """The loss. `outputs` `[N, 4]` logits, `labels` `[N]` class indices, `quality` `[N, 4]` relative rises of KL."""
    probabilities = outputs.softmax(-1)
    cost = probabilities @ (torch.tensor(WIDTHS, dtype=outputs.dtype) / max(WIDTHS))
    imitation = nn.functional.cross_entropy(outputs, labels)
    return weights.a * imitation + weights.b * cost.mean() + weights.c * (probabilities * quality).sum(-1).mean()


def train_commit(
    table: pd.DataFrame,
    features: Sequence[str] = IMITATION_FEATURES,
    label: str = "kv_bits",
    weights: LossWeights = LossWeights(),
    hidden: Sequence[int] = (64, 64),
    seed: int = 0,
    epochs: int = 300,
    patience: int = 20,
    validation: float = 0.2,
) -> tuple[Network, History]:
    """Train a network that maps `features` to the width in column `label`, stopping early on held-out texts.

    `table` has a row a token, with `text_id`, the features and, where `weights.c` is not 0, the columns `cost_2` to
    `cost_16` of `measure_costs`. Raises `ValueError` for missing columns.
    """
    missing = [c for c in (*features, label, "text_id", *(COST_COLUMNS if weights.c else ())) if c not in table]
    if missing:
        raise ValueError(f"the table lacks column(s) {', '.join(missing)}")
    inputs = torch.tensor(table[list(features)].to_numpy(np.float32))
    labels = torch.tensor(np.searchsorted(WIDTHS, table[label].to_numpy()))
    quality = torch.zeros(len(table), len(WIDTHS))
    if weights.c:
        quality = torch.tensor(table[COST_COLUMNS].to_numpy(np.float32) / table[COST_COLUMNS[0]].mean())
    held = split_texts(table["text_id"].to_numpy(), validation, seed)
    parts = [tuple(x[torch.tensor(rows)] for x in (inputs, labels, quality)) for rows in (~held, held)]
    torch.manual_seed(seed)
    network = Network.create(features, parts[0][0], hidden, len(WIDTHS))
    history = fit_network(network, lambda *x: commit_loss(*x, weights), *parts, epochs, patience, batch=256, rate=2e-3)
    return network, history


def save_commit(network: Network, folder: str | Path, name: str, table: pd.DataFrame, about: dict[str, object]) -> None:
    """Save a commit network with what its use needs: its rates on `table` and the token counts of its texts."""
    counts = {int(token): int(count) for token, count in table["token_id"].value_counts().sort_index().items()}
    network.save(folder, name, {**about, "rates": rate_table(network, table), "token_counts": counts})


def commit_tasks(table: pd.DataFrame, multiplier: float) -> dict[str, dict]:
    """Settings of `train_commit` for both tasks: `imitation` learns `kv_bits`, `commit` learns `optimal_bits`.

    For the latter, cost and quality enter the loss in the proportion of the `multiplier` of `measure_costs`.
    """
    cost_weight = max(WIDTHS) * multiplier / table[COST_COLUMNS[0]].mean()
    return {
        "imitation": {"features": IMITATION_FEATURES, "label": "kv_bits", "weights": LossWeights()},
        "commit": {"features": COMMIT_FEATURES, "label": "optimal_bits", "weights": LossWeights(1.0, cost_weight, 1.0)},
    }
