"""Attention that reads the packed cache, offered to transformers under the name "packed_kv".

`use_packed_attention(model)` is all a user needs. The same attention serves every other cache: tensors go on to
the library's scaled-dot-product attention.
"""

from functools import lru_cache
from importlib import import_module
from types import ModuleType

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from helpers.cache.attention.compiled import opaque_operator
from helpers.cache.attention.received import record_prompt_received
from helpers.cache.attention.reference import packed_attention
from helpers.cache.attention.variance import attention_variance
from helpers.cache.attention.weights import plain_weights
from helpers.cache.kv_cache import PACKED_ATTENTION
from helpers.cache.layer import PackedStates, UnreadStates

QUERIES_AT_ONCE = 256  # of attention that is worked out in plain PyTorch
FAST = {"cpu": "numba_cpu", "cuda": "triton_cuda"}


def use_packed_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Let `model` read `PackedKVCache` directly; without this the cache hands out dequantized tensors.

    Raises `ValueError` for models whose attention cannot be exchanged.
    """
    # The mask function must be registered as well: without one transformers drops the padding mask silently.
    AttentionInterface.register(PACKED_ATTENTION, packed_attention_forward)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)
    if model.config._attn_implementation != PACKED_ATTENTION:
        raise ValueError(f"{type(model).__name__} does not take attention functions; use the cache without this call")
    return model


def packed_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor | PackedStates,
    value: torch.Tensor | PackedStates,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention function in transformers' calling convention; returns `[B, query tokens, heads, D]` and None.

    `query` is `[B, heads, query tokens, D]`; `key` and `value` are tensors or the cache's `PackedStates`;
    `attention_mask` covers keys by their position in the text; `softcap` and `s_aux` are of
    `reference.packed_attention`.
    """
    if isinstance(key, UnreadStates):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = key.key, key.value, key.handle
        return _opaque(query, *states, attention_mask, s_aux, key.layer_idx, scaling, softcap), None
    special = {"softcap": softcap, "s_aux": s_aux}
    if not isinstance(key, PackedStates):
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **special, **kwargs)
    unsupported = ("position_bias", "sliding_window")
    if refused := [name for name in unsupported if kwargs.get(name) is not None]:
        raise ValueError(f"packed attention does not support {', '.join(refused)}, which {type(module).__name__} uses")
    states, cache = key, key.cache
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if states.layer_idx == 0:
        _note_padding(states, attention_mask)
    record = cache.record_variance and states.layer_idx == len(cache.packed) - 1
    if states.store is None:
        tail_keys, tail_values = states.tail_keys, states.tail_values
        if record:
            cache.attention_variance = attention_variance(query, tail_keys, attention_mask, scaling, **special)
        if cache.record_received:
            record_prompt_received(query, states, attention_mask, scaling, **special)
        output, _ = dense_attention(module, query, tail_keys, tail_values, attention_mask, scaling=scaling, **special)
    else:
        attend = choose(query, states, attention_mask, record)
        output, variance = attend(query, states, attention_mask, scaling, record, **special)
        output = output.transpose(1, 2).contiguous()
        if record:
            cache.attention_variance = variance
    if states.layer_idx == len(cache.packed) - 1:
        cache.end_forward()
    return output, None


_opaque = opaque_operator(packed_attention_forward)


def choose(query: torch.Tensor, states: PackedStates, attention_mask: torch.Tensor | None, record_variance: bool):
    """The implementation of packed attention that serves a call: the device's fast one if it can, else `reference`."""
    fast = implementation(query.device.type)
    if fast is not None and fast.supports(query, states, attention_mask, record_variance):
        return fast.packed_attention
    return packed_attention


@lru_cache
def implementation(device_type: str) -> ModuleType | None:
    """The module of the fast implementation for a kind of device; None, after a printed line, where it cannot run."""
    name = FAST.get(device_type)
    if name is None:
        return None
    try:
        module = import_module(f"helpers.cache.attention.{name}")
        module.prepare()
    except Exception as error:  # whatever is wrong with a compiler here, the reference works
        print(f"packed attention: {name} cannot run here, plain PyTorch is used ({type(error).__name__}: {error})")
        return None
    return module


def implementation_name(device_type: str) -> str:
    """Which implementation of packed attention serves a kind of device: "numba_cpu", "triton_cuda" or "reference"."""
    return "reference" if implementation(device_type) is None else FAST[device_type]


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The library's scaled-dot-product attention, same convention, same numbers.

    Where there is a mask, the library copies keys and values once for every query head that shares them; attention
    on a CPU does not need the copies. `softcap` and `s_aux`, which the library's leaves out without a word, are worked
    out in plain PyTorch.
    """
    if softcap is not None or s_aux is not None:
        return _plain_attention(query, key, value, attention_mask, scaling, softcap, s_aux), None
    if attention_mask is None or query.device.type != "cpu" or kwargs.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    dropout = kwargs.get("dropout", 0.0)
    output = scaled_dot_product_attention(
        query, key, value, attention_mask, dropout_p=dropout, scale=scaling, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), None


def _plain_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    s_aux: torch.Tensor | None,
) -> torch.Tensor:
    """`[B, query tokens, heads, D]`, some queries at a time, so that not all weights are there at once."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, tokens, parts = query.shape[2], key.shape[2], []
    for at in range(0, queries, QUERIES_AT_ONCE):
        stop = min(at + QUERIES_AT_ONCE, queries)
        seen = tokens - queries + stop if attention_mask is None else tokens
        mask = None if attention_mask is None else attention_mask[:, :, at:stop, :seen]
        weights, _ = plain_weights(query[:, :, at:stop], key[:, :, :seen], mask, scaling, softcap, s_aux)
        parts.append((weights.to(value.dtype) @ value[:, :, None, :seen]).flatten(1, 2))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _note_padding(states: PackedStates, attention_mask: torch.Tensor | None) -> None:
    """Tell the cache which tokens are real until it has fixed its centring vectors: what the last query may see."""
    cache = states.cache
    if not cache.stores and attention_mask is not None:
        last = attention_mask[:, 0, -1]
        last = last if last.dtype == torch.bool else last >= 0
        cache.visible = last.expand(states.tail_keys.shape[0], -1).clone()
