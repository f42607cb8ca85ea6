"""Packed attention in plain PyTorch: the definition that the fast implementations are held to.

Keys are stored as `(k - c) E`, values as `v R`. A query sees keys as `q k = (q F) ((k - c) E) + q c`, F the transposed
inverse of E (both are R where keys are not balanced), and the output is `sum p v = (sum p (v R)) R^T`. So the query is
turned once and the output turned back once, and packed tokens are read in the order in which they lie: softmax does not
depend on it.
"""

from collections.abc import Iterator

import torch

from helpers.cache.attention.received import record_tail_received
from helpers.cache.attention.variance import row_variance
from helpers.cache.attention.weights import apply_mask, capped, future_keys, grouped_mask, softmax
from helpers.cache.codec import Codec
from helpers.cache.layer import PackedStates
from helpers.cache.quantization import FULL_WIDTH
from helpers.cache.tokens import EMPTY, PackedTokens


def packed_attention(
    query: torch.Tensor,
    states: PackedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    record_variance: bool = False,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `query` `[B, heads, Q, D]` over one layer's packed tokens and its tail.

    `attention_mask`, bool or additive, is `[B or 1, heads or 1, Q, tokens]` with keys by position; without it the
    queries are the newest tokens and see everything up to themselves. `softcap` draws the scaled scores smoothly into
    (-softcap, softcap) (Gemma 2); `s_aux` `[heads]` are scores of nothing, which take a share of each row's weights
    (gpt-oss). Computed in float32 (float64 where the query
    is). Returns `[B, heads, Q, D]` in the query's dtype and, if asked for, the variance `[B, Q]` of the attention
    rows, mean over heads. Where the cache records attention received (see `received`), it is added to pending tokens
    and to those of the tail.
    """
    store, layer = states.store, states.layer
    rows, heads, queries, _ = query.shape
    kv_heads = states.tail_keys.shape[1]
    q = query.to(store.dtype).reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    mask = grouped_mask(attention_mask, rows, heads, kv_heads)
    segments = [segment for _, segment in states.segments]
    held = [segment.used(layer) for segment in segments]

    scores = []
    packed = _packed_scores(q, store.key, held, layer)
    for segment, tokens, part in zip(segments, held, packed, strict=True):
        part = capped(part * scaling, softcap)
        if mask is not None:
            at = tokens.positions().clamp_(max=mask.shape[-1] - 1)[:, :, None, None]
            part = apply_mask(part, mask.gather(-1, at.expand(*mask.shape[:-1], at.shape[-1])))
        if segment.ragged:
            part = part.masked_fill((tokens.token == EMPTY)[:, :, None, None], -torch.inf)
        scores.append(part)
    tail = capped((q @ states.tail_keys.to(store.dtype)[:, :, None].mT) * scaling, softcap)
    if mask is not None:
        tail = apply_mask(tail, mask[..., -tail.shape[-1] :])
    elif queries > 1:
        tail = tail.masked_fill(future_keys(queries, tail.shape[-1], query.device), -torch.inf)
    scores.append(tail)

    scores = torch.cat(scores, dim=-1)
    weights = softmax(scores, s_aux)
    # A row of padding sees nothing; its softmax is not a number, and nobody reads what comes of it.
    weights = weights.nan_to_num(0.0) if mask is not None else weights
    output = _weighted_values(weights, states, held)
    if states.cache.record_received and tail.shape[-1] > states.cache.block:
        record_tail_received(weights[..., -tail.shape[-1] :], states)
    variance = None
    if record_variance:
        seen = scores.isfinite().sum(-1)
        variance = row_variance(weights, seen).flatten(1, 2).mean(1)
    return output.flatten(1, 2).to(query.dtype), variance


def _packed_scores(q: torch.Tensor, codec: Codec, held: list[PackedTokens], layer: int) -> Iterator[torch.Tensor]:
    """Unscaled scores `[B, H, G, Q, slots]` of grouped queries against the keys of each segment."""
    turned = q if codec.basis is None else codec.turned_query(q, layer)
    for tokens in held:
        stored = codec.read(tokens.key)[:, :, None].mT
        if tokens.key.bits == FULL_WIDTH:
            yield q @ stored
        elif codec.centre is None:
            yield turned @ stored
        else:
            yield turned @ stored + codec.centre.scores(q, tokens.block_start, layer)


def _weighted_values(weights: torch.Tensor, states: PackedStates, held: list[PackedTokens]) -> torch.Tensor:
    """Sum of all values by `weights` `[B, H, G, Q, tokens]`, tail last; notes what pending tokens receive."""
    codec = states.store.value
    plain, rotated, at = 0, 0, 0
    for tokens in held:
        part = weights[..., at : at + tokens.token.shape[-1]]
        at += part.shape[-1]
        weighted = part @ codec.read(tokens.value)[:, :, None]
        if tokens.value.bits == FULL_WIDTH or codec.basis is None:
            plain = plain + weighted
        else:
            rotated = rotated + weighted
        if tokens.received is not None:
            tokens.received.add_(part.sum((2, 3)))
    output = plain + weights[..., at:] @ states.tail_values.to(codec.dtype)[:, :, None]
    return output + rotated @ codec.basis.T if isinstance(rotated, torch.Tensor) else output
