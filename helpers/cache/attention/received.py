"""Attention received: how much of the attention of later queries a token gets, by which tokens are ranked.

A token counts what the queries of later blocks give it, summed over them and over the query heads that share its
key/value head. While a text is read token by token, every query counts; packed attention adds what committed tokens
receive to their bucket. A prompt is read in one forward, before anything of it is committed: there only its newest
`RECEIVED_WINDOW` queries count (as in SnapKV's observation window, arXiv 2404.14469), and the layer keeps the sums
until the tokens are committed.
"""

import torch

from helpers.cache.attention.weights import plain_weights
from helpers.cache.layer import PackedStates

RECEIVED_WINDOW = 64  # queries


def record_prompt_received(
    query: torch.Tensor,
    states: PackedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> None:
    """Add what the tokens of a layer receive while nothing is committed, from the newest queries `[B, heads, Q, D]`."""
    keys, last = states.tail_keys, slice(-RECEIVED_WINDOW, None)
    if keys.shape[2] > states.cache.block:
        mask = None if attention_mask is None else attention_mask[:, :, last]
        weights, _ = plain_weights(query[:, :, last], keys, mask, scaling, softcap, s_aux)
        record_tail_received(weights, states)


def record_tail_received(weights: torch.Tensor, states: PackedStates) -> None:
    """Add what the tokens of a layer's tail receive from later blocks of the tail.

    `weights` `[B, H, G, Q, tail tokens]` are those of the newest queries, of which the last `RECEIVED_WINDOW` count.
    """
    weights, size = weights[..., -RECEIVED_WINDOW:, :], states.cache.block
    queries, keys = weights.shape[-2:]
    older = (keys - queries) // size * size  # tokens of blocks that are older than all of the queries
    block = torch.arange(older, keys, device=weights.device) // size
    later = block[-queries:, None] > block
    received = [weights[..., :older].sum((2, 3)), (weights[..., older:] * later).sum((2, 3))]
    states.cache.packed[states.layer_idx].add_received(torch.cat(received, -1))
