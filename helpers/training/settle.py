"""Training the network that ranks the tokens of a block when the block settles: `settle`."""

from collections.abc import Sequence

import numpy as np
import torch

from helpers.policies.learned import SETTLE_FEATURES
from helpers.policies.network import Network
from helpers.training.fitting import History, fit_network, split_texts


def settle_loss(outputs: torch.Tensor, damage: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of `damage` `[...]` under an exponential law of mean `exp(outputs)` `[..., 1]`.

    The damage of one token in one head is estimated from few draws, so its noise is multiplicative; this loss is
    least where the outputs are the logarithm of the expected damage.
    """
    score = outputs[..., 0]
    return (damage * (-score).clamp(max=15).exp() + score).mean()


def train_settle(
    inputs: torch.Tensor,
    damage: torch.Tensor,
    text_ids: np.ndarray,
    hidden: Sequence[int] = (64, 64),
    seed: int = 0,
    epochs: int = 30,
    patience: int = 4,
    validation: float = 0.2,
) -> tuple[Network, History]:
    """Train a network that ranks the tokens of a block in one head by the damage that demoting them does.

    `inputs` `[blocks, block, features]` from `settle_inputs`, `damage` `[blocks, block]` from
    `head_costs`, `text_ids` `[blocks]`. Damage is taken relative to its block's mean: what counts is the
    order within a block.
    """
    relative = (damage / damage.mean(-1, keepdim=True).clamp(min=1e-30)).float()
    held = torch.tensor(split_texts(text_ids, validation, seed))
    parts = [(inputs[rows], relative[rows]) for rows in (~held, held)]
    torch.manual_seed(seed)
    network = Network.create(SETTLE_FEATURES, parts[0][0].flatten(0, 1), hidden, 1)
    return network, fit_network(network, settle_loss, *parts, epochs, patience, batch=128, rate=2e-3)
