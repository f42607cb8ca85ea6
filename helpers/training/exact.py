"""What storing one token at a width does to the predictions that follow, measured: the rise of their KL divergence.

The model reads the text again for every token and width, so this is slow; `fisher` estimates the same.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from helpers.cache import WIDTHS
from helpers.evaluation import kl_divergence
from helpers.training.states import text_states

HORIZON = 64


class _PerturbedLayer(DynamicLayer):
    """Holds a prefix, and puts one extra slot a row behind the new tokens: a token as another width stores it."""

    def __init__(self, prefix: Sequence[torch.Tensor], extra: Sequence[torch.Tensor]):
        super().__init__()
        self.prefix, self.extra = prefix, extra

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        parts = zip(self.prefix, (key_states, value_states), self.extra, strict=True)
        return tuple(torch.cat([old.expand(len(new), -1, -1, -1), new, slot], dim=2) for old, new, slot in parts)

    def get_seq_length(self) -> int:
        return self.prefix[0].shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length + 1, 0


@torch.no_grad()
def exact_costs(
    model: PreTrainedModel,
    ids: Sequence[int],
    tokens: Sequence[int],
    widths: Sequence[int] = WIDTHS,
    horizon: int = HORIZON,
    batch: int = 64,
) -> np.ndarray:
    """Rise of KL (nats, summed over the `horizon` following predictions or to the end), `[tokens, widths]`.

    For the positions `tokens` of the text `ids`: later tokens see that one token as a width stores it, and all others
    in full precision; the token itself has read itself before it was stored.
    """
    row = torch.tensor([list(ids)], device=model.device)
    full = DynamicCache(config=model.config)
    reference = model(input_ids=row, cache=full).logits[0]
    states = text_states(full, model.config)
    stored = [states.stored(bits) for bits in widths]
    costs = np.zeros((len(tokens), len(widths)))
    pairs = sorted((t, i, w) for i, t in enumerate(tokens) for w in range(len(widths)))  # token, its place, width's
    while pairs:
        first = pairs[0][0]
        group = [p for p in pairs[:batch] if p[0] < first + 16]  # tokens close together share a window
        pairs = pairs[len(group) :]
        at = torch.tensor([t for t, _, _ in group], device=model.device)
        stop = min(len(ids), int(at.max()) + 1 + horizon)
        window = torch.arange(first, stop, device=model.device)
        layers = []
        for layer in range(len(full.layers)):
            prefix = tuple(x[layer][:, :, :first] for x in states.full)
            extra = [torch.cat([stored[w][side][layer][:, :, t : t + 1] for t, _, w in group]) for side in (0, 1)]
            layers.append(_PerturbedLayer(prefix, extra))
        keys = torch.arange(stop, device=model.device)
        later = window > at[:, None]  # queries that see the token as it is stored
        visible = (keys <= window[:, None]) & ~(later[:, :, None] & (keys == at[:, None, None]))
        mask = torch.cat([visible, later[:, :, None]], dim=-1)[:, None]
        logits = model(
            input_ids=row[:, first:stop].expand(len(group), -1),
            cache=Cache(layers=layers),
            attention_mask=mask,
            position_ids=window[None].expand(len(group), -1),
        ).logits
        kl = kl_divergence(reference[first:stop], logits)
        counted = later & (window <= at[:, None] + horizon)
        for (_, i, w), rise in zip(group, (kl * counted).sum(-1).tolist(), strict=True):
            costs[i, w] = rise
    return costs
