"""Packed attention beside `torch.compile`: taking a layer's tokens and attending to them is one operator.

What it does to the cache no graph can hold: tokens move between buckets, and Python counts them. So the compiler sees
one call a layer, alike in all of them, and neither breaks the graph nor compiles it anew for each layer or cache.
"""

from collections.abc import Callable
from types import SimpleNamespace

import torch

from helpers.cache.kv_cache import CACHES


def opaque_operator(attend: Callable[..., tuple[torch.Tensor, None]]) -> Callable[..., torch.Tensor]:
    """The operator over `attend`, an attention function of transformers' that takes `PackedStates`.

    Its arguments are those of `UnreadStates` and of the attention function; it returns `[B, query tokens, heads, D]`.
    """

    @torch.library.custom_op("packed_kv::attend", mutates_args=())
    def operator(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        handle: torch.Tensor,
        attention_mask: torch.Tensor | None,
        s_aux: torch.Tensor | None,
        layer_idx: int,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        states, _ = CACHES[handle.item()].update(key, value, layer_idx)
        layer = SimpleNamespace(num_key_value_groups=query.shape[1] // key.shape[1], is_causal=True)
        return attend(layer, query, states, states, attention_mask, scaling, softcap, s_aux)[0]

    @operator.register_fake
    def _(query, key, value, handle, attention_mask, s_aux, layer_idx, scaling, softcap):
        rows, heads, queries, _ = query.shape
        return query.new_empty(rows, queries, heads, value.shape[3])

    return operator
