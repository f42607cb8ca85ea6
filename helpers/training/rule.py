"""The entropy rule's thresholds, from how unsure a model is of training texts.

Fixed in nats they mean something else on every model and vocabulary; as quantiles they choose all four widths on each.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from helpers.policies import EntropyRule
from helpers.policies.features import entropy_of, log_probabilities

RULE_SHARES = (0.40, 0.45, 0.10, 0.05)  # of tokens at 2, 4, 8 and 16 bits: 4.2 bits on average


@torch.no_grad()
def calibrate_rule(
    model: PreTrainedModel, texts: Sequence[Sequence[int]], shares: Sequence[float] = RULE_SHARES
) -> EntropyRule:
    """The rule that gives these `shares` of the tokens of `texts` (token ids), read in full precision, 2 to 16 bits.

    Raises `ValueError` for shares that are not four positive numbers with sum 1, and where no text has a token.
    """
    if len(shares) != 4 or min(shares) <= 0 or not abs(sum(shares) - 1) <= 1e-6:
        raise ValueError(f"shares must be four positive numbers that sum to 1, got {tuple(shares)}")
    rows = [torch.tensor([list(ids)], device=model.device) for ids in texts if len(ids)]
    if not rows:
        raise ValueError(f"texts must have tokens, got none in {len(texts)} texts")
    entropies = torch.cat([entropy_of(log_probabilities(model(input_ids=row).logits))[0].float() for row in rows])
    edges = torch.tensor(shares[:3], dtype=torch.float64).cumsum(0).to(entropies)
    return EntropyRule(tuple(round(float(x), 3) for x in torch.quantile(entropies.cpu(), edges.cpu())))
