"""What is recorded of attention weights: variance of rows, attention received."""

import torch

from helpers.cache.layer import PackedStates


def row_variance(weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Population variance of attention rows `[..., Q, keys]` over the `seen` `[..., Q]` keys that each may see.

    Keys that a query may not see have weight 0 and are not counted; a row that sees none (padding) has variance 0.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    seen = seen.clamp(min=1).to(weights.dtype)
    return (weights.square().sum(-1) / seen - 1 / seen.square()).clamp(min=0)


def received_attention(weights: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Attention that each key received, summed over queries and over the query heads that share its KV head.

    `weights` `[..., heads, queries, keys]`, gives `[..., kv_heads, keys]` (ZipCache and H2O rank tokens by it).
    """
    return weights.unflatten(-3, (kv_heads, -1)).sum(dim=(-3, -2))


RECEIVED_WINDOW = 64  # newest queries of a prompt whose attention ranks its tokens (as SnapKV's observation window)


def record_tail_received(weights: torch.Tensor, states: PackedStates) -> None:
    """Note what tokens of the tail receive from later blocks of the tail; `weights` `[B, H, G, Q, tail tokens]`.

    The queries are the newest tokens. This is how a prompt that is read at once gets its ranking.
    """
    queries, keys = weights.shape[-2:]
    block = torch.arange(keys, device=weights.device) // states.cache.block
    later = block[keys - queries :, None] > block
    states.cache.layers[states.layer_idx].add_received((weights * later).sum((2, 3)))


def grouped_mask(mask: torch.Tensor | None, rows: int, heads: int, kv_heads: int) -> torch.Tensor | None:
    """The mask as `[B, H, G, Q, tokens]`, a view where it is the same for all heads."""
    if mask is None:
        return None
    return mask.expand(rows, heads, *mask.shape[2:]).unflatten(1, (kv_heads, heads // kv_heads))


def apply_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    hidden = mask <= torch.finfo(mask.dtype).min  # how transformers writes "not visible" additively
    return (scores + mask.to(scores.dtype)).masked_fill(hidden, -torch.inf)


def future_keys(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """True where a key is newer than its query; the queries are the newest of the keys."""
    query_at = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) > query_at[:, None]


def prompt_received(
    query: torch.Tensor, states: PackedStates, attention_mask: torch.Tensor | None, scaling: float
) -> None:
    """Note what the tokens of a tail that is all there is receive from the last `RECEIVED_WINDOW` queries."""
    keys, last = states.tail_keys, slice(-RECEIVED_WINDOW, None)
    if keys.shape[2] > states.cache.block:
        mask = None if attention_mask is None else attention_mask[:, :, last]
        weights, _ = _dense_weights(query[:, :, last], keys, mask, scaling)
        record_tail_received(weights, states)


def _dense_weights(
    query: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights `[B, H, G, Q, keys]` of the newest queries over plain keys, and how many keys each sees."""
    rows, heads, queries, _ = query.shape
    kv_heads, tokens = keys.shape[1], keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    scores = q @ keys.to(dtype)[:, :, None].mT * scaling
    if attention_mask is None:
        scores = scores.masked_fill(future_keys(queries, tokens, query.device), -torch.inf)
    else:
        scores = apply_mask(scores, grouped_mask(attention_mask, rows, heads, kv_heads))
    return scores.softmax(-1).nan_to_num(0.0), scores.isfinite().sum(-1)


def attention_variance(
    query: torch.Tensor, keys: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float, chunk: int = 256
) -> torch.Tensor:
    """Variance `[B, Q]` of the attention rows, mean over heads, for plain keys `[B, H, tokens, D]`.

    Worked through `chunk` queries at a time, since no fused kernel gives the weights.
    """
    queries, tokens = query.shape[2], keys.shape[2]
    variances = []
    for at in range(0, queries, chunk):
        stop = min(at + chunk, queries)
        seen = tokens - queries + stop  # without a mask, later keys are not visible to this chunk anyway
        mask = None if attention_mask is None else attention_mask[:, :, at:stop, :seen]
        weights, visible = _dense_weights(query[:, :, at:stop], keys[:, :, :seen], mask, scaling)
        variances.append(row_variance(weights, visible).flatten(1, 2).mean(1))
    return torch.cat(variances, dim=-1)
