"""Attention weights over plain keys, in plain PyTorch, and the masks that go into them.

No fused kernel gives its weights, so what is recorded of them (`variance`, `received`) is worked out here.
"""

import torch


def plain_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights `[B, H, G, Q, tokens]` of the newest queries over all keys, and the scores that they come from, scaled.

    `query` is `[B, H * G, Q, D]`, `keys` `[B, H, tokens, D]`: G query heads share a key/value head. The score of a key
    that a query does not see is -inf. `softcap` and `s_aux` as in `reference.packed_attention`.
    """
    rows, heads, queries, _ = query.shape
    kv_heads = keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    q = query.to(dtype).reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    scores = capped((q @ keys.to(dtype)[:, :, None].mT).mul_(scaling), softcap)
    if attention_mask is None:
        scores[..., -queries:].masked_fill_(future_keys(queries, queries, query.device), -torch.inf)
        return softmax(scores, s_aux), scores
    scores = apply_mask(scores, grouped_mask(attention_mask, rows, heads, kv_heads))
    return softmax(scores, s_aux).nan_to_num(0.0), scores  # padding sees nothing


def capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """Scores drawn smoothly into (-softcap, softcap), before any mask; as they are where there is no cap."""
    return scores if softcap is None else (scores / softcap).tanh_().mul_(softcap)


def softmax(scores: torch.Tensor, s_aux: torch.Tensor | None) -> torch.Tensor:
    """Weights of scores `[B, H, G, Q, tokens]`; with `s_aux` `[heads]` a share of each row goes to no token."""
    if s_aux is None:
        return scores.softmax(-1)
    aside = s_aux.to(scores).view(1, *scores.shape[1:3], 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, aside], -1).softmax(-1)[..., :-1]


def grouped_mask(mask: torch.Tensor | None, rows: int, heads: int, kv_heads: int) -> torch.Tensor | None:
    """The mask as `[B, H, G, Q, tokens]`, a view where it is the same for all heads."""
    if mask is None:
        return None
    return mask.expand(rows, heads, *mask.shape[2:]).unflatten(1, (kv_heads, heads // kv_heads))


def apply_mask(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Scores with -inf where `mask`, bool or additive, hides a key."""
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, -torch.inf)
    hidden = mask <= torch.finfo(mask.dtype).min  # how transformers writes "not visible" additively
    return (scores + mask.to(scores.dtype)).masked_fill(hidden, -torch.inf)


def future_keys(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """True where a key is newer than its query; the queries are the newest of the keys."""
    query_at = torch.arange(keys - queries, keys, device=device)
    return torch.arange(keys, device=device) > query_at[:, None]
