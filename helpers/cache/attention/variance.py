"""Variance of attention rows: how evenly a query spreads its attention over the keys that it may see."""

import torch

from helpers.cache.attention.weights import plain_weights


def row_variance(weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Population variance of attention rows `[..., Q, keys]` over the `seen` `[..., Q]` keys that each may see.

    Keys that a query may not see have weight 0 and are not counted; a row that sees none (padding) has variance 0.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    seen = seen.clamp(min=1).to(weights.dtype)
    return (weights.square().sum(-1) / seen - (weights.sum(-1) / seen).square()).clamp(min=0)


def attention_variance(
    query: torch.Tensor,
    keys: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    chunk: int = 256,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> torch.Tensor:
    """Variance `[B, Q]` of the attention rows, mean over heads, for plain keys `[B, H, tokens, D]`.

    Worked through `chunk` queries at a time, so that not all weights are there at once.
    """
    queries, tokens = query.shape[2], keys.shape[2]
    variances = []
    for at in range(0, queries, chunk):
        stop = min(at + chunk, queries)
        seen = tokens - queries + stop  # without a mask, later keys are not visible to this chunk anyway
        mask = None if attention_mask is None else attention_mask[:, :, at:stop, :seen]
        weights, scores = plain_weights(query[:, :, at:stop], keys[:, :, :seen], mask, scaling, softcap, s_aux)
        variances.append(row_variance(weights, scores.isfinite().sum(-1)).flatten(1, 2).mean(1))
    return torch.cat(variances, dim=-1)
