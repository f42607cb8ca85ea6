"""Packed attention in plain PyTorch: the definition that the fast implementations are held to.

Keys are stored as `(k - c) R`, values as `v R`. A query sees keys as `q k = (q R) ((k - c) R) + q c`, and the output is
`sum p v = (sum p (v R)) R^T`. So the query is rotated once and the output rotated back once, and packed tokens are
read in the order in which they lie: softmax does not depend on it.
"""

import torch

from helpers.cache.attention.statistics import (
    RECEIVED_WINDOW,
    apply_mask,
    future_keys,
    grouped_mask,
    record_tail_received,
    row_variance,
)
from helpers.cache.bucket import EMPTY, Bucket
from helpers.cache.layer import PackedStates
from helpers.cache.quantization import FULL_WIDTH


def packed_attention(
    query: torch.Tensor,
    states: PackedStates,
    attention_mask: torch.Tensor | None,
    scaling: float,
    record_variance: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of `query` `[B, heads, Q, D]` over one layer's packed tokens and its tail.

    `attention_mask`, bool or additive, is `[B or 1, heads or 1, Q, tokens]` with keys by position; without it the
    queries are the newest tokens and see everything up to themselves. Computed in float32 (float64 where the query
    is). Returns `[B, heads, Q, D]` in the query's dtype and, if asked for, the variance `[B, Q]` of the attention
    rows, mean over heads. Attention received by pending tokens is added to their bucket where the store records it.
    """
    store, layer = states.store, states.layer
    rows, heads, queries, _ = query.shape
    kv_heads = states.tail_keys.shape[1]
    q = query.to(store.dtype).reshape(rows, kv_heads, heads // kv_heads, queries, -1)
    q_rotated = q_centre = None
    if store.rotation:
        q_rotated = q @ store.rotation["key"]
        q_centre = (q * store.centre[layer][:, :, None, None]).sum(-1, keepdim=True)
    mask = grouped_mask(attention_mask, rows, heads, kv_heads)

    scores = []
    for bucket in states.buckets:
        part = _bucket_scores(bucket, layer, store, q, q_rotated, q_centre) * scaling
        if mask is not None:
            at = bucket.positions(layer).clamp_(max=mask.shape[-1] - 1)[:, :, None, None]
            part = apply_mask(part, mask.gather(-1, at.expand(*mask.shape[:-1], at.shape[-1])))
        if bucket.ragged:
            empty = bucket.view("token", layer) == EMPTY
            part = part.masked_fill(empty[:, :, None, None], -torch.inf)
        scores.append(part)
    tail = (q @ states.tail_keys.to(store.dtype)[:, :, None].mT) * scaling
    if mask is not None:
        tail = apply_mask(tail, mask[..., -tail.shape[-1] :])
    elif queries > 1:
        tail = tail.masked_fill(future_keys(queries, tail.shape[-1], query.device), -torch.inf)
    scores.append(tail)

    scores = torch.cat(scores, dim=-1)
    weights = scores.softmax(dim=-1)
    # A row of padding sees nothing; its softmax is not a number, and nobody reads what comes of it.
    weights = weights.nan_to_num(0.0) if mask is not None else weights
    output = _weighted_values(weights, states, layer)
    if states.cache.record_received and tail.shape[-1] > states.cache.block:
        record_tail_received(weights[..., -RECEIVED_WINDOW:, -tail.shape[-1] :], states)
    variance = None
    if record_variance:
        seen = scores.isfinite().sum(-1)
        variance = row_variance(weights, seen).flatten(1, 2).mean(1)
    return output.flatten(1, 2).to(query.dtype), variance


def _bucket_scores(bucket: Bucket, layer: int, store, q, q_rotated, q_centre) -> torch.Tensor:
    """Unscaled scores `[B, H, G, Q, slots]` of grouped queries against the keys of one bucket."""
    bits = bucket.stage.key_bits
    keys = store.read(bucket.side("key", layer), "key", bits)[:, :, None]
    if bits == FULL_WIDTH or q_rotated is None:
        return q @ keys.mT
    return q_rotated @ keys.mT + q_centre


def _weighted_values(weights: torch.Tensor, states: PackedStates, layer: int) -> torch.Tensor:
    store = states.store
    tail_values = states.tail_values.to(store.dtype)[:, :, None]
    plain, rotated, at = 0, 0, 0
    for bucket in states.buckets:
        part = weights[..., at : at + bucket.slots]
        at += bucket.slots
        bits = bucket.stage.value_bits
        weighted = part @ store.read(bucket.side("value", layer), "value", bits)[:, :, None]
        if bits == FULL_WIDTH or not store.rotation:
            plain = plain + weighted
        else:
            rotated = rotated + weighted
        if "received" in bucket.fields:
            bucket.view("received", layer).add_(part.sum((2, 3)))
    output = plain + weights[..., at:] @ tail_values
    if isinstance(rotated, torch.Tensor):
        output = output + rotated @ store.rotation["value"].T
    return output
