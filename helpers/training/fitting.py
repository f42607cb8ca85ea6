"""Fitting a small network, stopped early by its loss on texts that were held out as wholes.

What is fitted, and by which loss, is told by `commit` and `settle`.
"""

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from helpers.policies.network import Network


@dataclass
class History:
    """Losses of one training run, one entry an epoch, and the epoch whose weights were kept."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best: int = 0


def fit_network(
    network: Network, loss, train, validation, epochs: int, patience: int, batch: int, rate: float
) -> History:
    """Minimise `loss(outputs, *targets)` with AdamW until `patience` epochs bring no better validation loss.

    `train` and `validation` are tuples (inputs, *targets) of equally long tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small to be worth sharing
    optimizer = torch.optim.AdamW(network.layers.parameters(), lr=rate, weight_decay=1e-3)
    history, best_loss, best = History(), np.inf, None
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(train[0])).split(batch):
            value = loss(network(train[0][rows]), *(x[rows] for x in train[1:]))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.layers.parameters(), 1.0)
            optimizer.step()
            total += value.item() * len(rows)
        history.train.append(total / len(train[0]))
        with torch.no_grad():
            history.validation.append(loss(network(validation[0]), *validation[1:]).item())
        if history.validation[-1] < best_loss - 1e-6:
            best_loss, history.best = history.validation[-1], epoch
            best = copy.deepcopy(network.layers.state_dict())
        if epoch - history.best >= patience:
            break
    torch.set_num_threads(threads)
    network.layers.load_state_dict(best)
    network.layers.eval().requires_grad_(False)
    return history


def split_texts(text_ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """True for the rows of a seeded random `share` of the texts (one text at least, never all)."""
    texts = np.unique(text_ids)
    if len(texts) < 2:
        raise ValueError(f"splitting by text needs two texts or more, got {len(texts)}")
    count = min(max(1, round(share * len(texts))), len(texts) - 1)
    return np.isin(text_ids, np.random.default_rng(seed).permutation(texts)[:count])
