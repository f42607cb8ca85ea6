"""Predictions by networks that never saw the text they predict: cross-validation by whole texts."""

import numpy as np
import pandas as pd
import torch

from helpers.cache import WIDTHS
from helpers.evaluation import bootstrap_groups
from helpers.policies.network import Network
from helpers.training.commit import train_commit
from helpers.training.settle import train_settle

Folds = list[tuple[np.ndarray, Network]]  # which rows were held out, and the network that never saw their texts


def text_folds(text_ids: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """Which rows each fold holds out: each text falls into one, at random. Raises `ValueError` for too few texts."""
    texts = np.random.default_rng(seed).permutation(np.unique(text_ids))
    if len(texts) < folds + 1:
        raise ValueError(f"{folds} folds need more than {folds} texts, got {len(texts)}")
    return [np.isin(text_ids, texts[fold::folds]) for fold in range(folds)]


def cross_fit(table: pd.DataFrame, folds: int = 6, seed: int = 0, **settings) -> Folds:
    """Train `folds` networks (settings of `train_commit`), each without a share of the texts."""
    parts = text_folds(table["text_id"].to_numpy(), folds, seed)
    return [(held, train_commit(table[~held], seed=seed + i, **settings)[0]) for i, held in enumerate(parts)]


def held_out(table: pd.DataFrame, folds: Folds) -> np.ndarray:
    """Probabilities `[rows, 4]` of every row by the network that never saw the row's text."""
    result = np.zeros((len(table), len(WIDTHS)))
    for held, network in folds:
        inputs = torch.tensor(table.loc[held, list(network.features)].to_numpy(np.float32))
        result[held] = network(inputs).softmax(-1).numpy()
    return result


def shuffled_drops(table: pd.DataFrame, folds: Folds, label: str, seed: int = 0) -> pd.DataFrame:
    """Permutation importance on held-out texts: `feature`, `drop` in accuracy (points) and its interval over texts.

    Each feature in turn is shuffled among the rows of a held-out fold.
    """
    random = np.random.default_rng(seed)
    labels = table[label].to_numpy()
    right = np.array(WIDTHS)[held_out(table, folds).argmax(1)] == labels
    rows = []
    for name in folds[0][1].features:
        shuffled = table.copy()
        for held, _ in folds:
            shuffled.loc[held, name] = random.permutation(table.loc[held, name].to_numpy())
        lost = 100.0 * right - 100.0 * (np.array(WIDTHS)[held_out(shuffled, folds).argmax(1)] == labels)
        drop, low, high = bootstrap_groups(lambda i, lost=lost: lost[i].mean(), table["text_id"].to_numpy())
        rows.append({"feature": name, "drop": drop, "low": low, "high": high})
    return pd.DataFrame(rows)


def cross_validate_settle(
    inputs: torch.Tensor, damage: torch.Tensor, text_ids: np.ndarray, folds: int = 4, seed: int = 0, **settings
) -> torch.Tensor:
    """Scores `[blocks, block]` for every block by networks that never saw its text; settings of `train_settle`."""
    scores = torch.zeros(damage.shape)
    for fold, held in enumerate(text_folds(text_ids, folds, seed)):
        rest = ~held
        network, _ = train_settle(inputs[rest], damage[rest], text_ids[rest], seed=seed + fold, **settings)
        scores[held] = network(inputs[held])[..., 0]
    return scores
