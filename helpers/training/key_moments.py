"""Second moments of queries and of centred keys, from texts that a model reads in full precision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from helpers.cache.arguments import head_dim
from helpers.cache.attention.dispatch import dense_attention
from helpers.cache.centre import Centre
from helpers.cache.kinds import packed_layers
from helpers.cache.rotary import Rotary, rotary_of

RECORDING = "key_moments"  # the name under which transformers knows the attention that records
BLOCK = 16  # tokens that share a centring vector, as in the cache
SINKS = 4  # first tokens of a text, which are left out


@torch.no_grad()
def key_moments(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], sinks: int = SINKS
) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments `[packed layers, H, D, D]` of queries (mean over the heads of a key head) and of centred keys.

    Both after rotary embedding, float64, over all tokens of the `sequences` but the first `sinks` of each. Raises
    `ValueError` where there is nothing to measure.
    """
    usable = [ids for ids in sequences if len(ids) > sinks + BLOCK]
    if not usable:
        raise ValueError(f"sequences must have more than {sinks + BLOCK} tokens, got none of {len(sequences)} that has")
    sums: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    tokens = 0
    with _recording(model, sums, sinks):
        for ids in usable:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False, logits_to_keep=1)
            tokens += len(ids) - sinks
    layers = packed_layers(model.config)
    if not set(layers) <= sums.keys():
        raise ValueError(f"{type(model).__name__} does not take attention functions: its queries cannot be seen")
    return tuple(torch.stack([sums[layer][side] for layer in layers]) / tokens for side in range(2))


@contextmanager
def _recording(
    model: PreTrainedModel, sums: dict[int, tuple[torch.Tensor, torch.Tensor]], sinks: int
) -> Iterator[None]:
    """While this lasts, each layer's attention adds its moments to `sums`, under its number."""
    config = model.config.get_text_config(decoder=True)
    rotary, packed = rotary_of(config, head_dim(config)), set(packed_layers(config))

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        if module.layer_idx in packed:
            moments = _moments(query, key, rotary, sinks)
            known = sums.get(module.layer_idx)
            sums[module.layer_idx] = moments if known is None else tuple(map(torch.add, known, moments))
        return dense_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    before = model.config._attn_implementation
    AttentionInterface.register(RECORDING, attend)
    AttentionMaskInterface.register(RECORDING, sdpa_mask)
    model.set_attn_implementation(RECORDING)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _moments(query: torch.Tensor, key: torch.Tensor, rotary: Rotary, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of outer products `[H, D, D]` of one row's queries `[1, heads, n, D]` and keys `[1, H, n, D]`."""
    query, key = query.double(), key.double()
    centre = Centre(rotary, BLOCK, sinks)
    centre.fix(key[None])
    centre.reserve(key.shape[2])
    starts = torch.arange(key.shape[2], device=key.device) // BLOCK * BLOCK
    key = (key - centre.of(starts[None, None], 0))[0, :, sinks:]
    query = query[0, :, sinks:].unflatten(0, (len(key), -1))
    groups = query.shape[1]
    return torch.einsum("hgnd,hgne->hde", query, query) / groups, key.mT @ key


def key_harm(query: torch.Tensor, key: torch.Tensor, balance: torch.Tensor | None = None) -> torch.Tensor:
    """Product of the traces of both moments `[..., D, D]`, under `balance` if given: what an error of keys, evenly
    spread by a rotation, does to scores goes with it."""
    if balance is not None:
        inverse = torch.linalg.inv(balance)
        query, key = inverse @ query @ inverse, balance @ key @ balance
    return query.diagonal(dim1=-2, dim2=-1).sum(-1) * key.diagonal(dim1=-2, dim2=-1).sum(-1)
