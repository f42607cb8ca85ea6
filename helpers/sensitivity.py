"""What storing a token at each width costs the predictions that follow it, and the widths that are worth their bits.

Two measures of the same thing, the rise of KL(full precision || stored) summed over the following predictions when
one token alone is stored at a width:

* `exact_costs` runs the model once for every token and width (in batches);
* `fisher_costs` needs a few backward passes for a whole text: to second order the rise is `d' F d / 2`, with `d` the
  change that quantization makes to keys and values and `F` the Fisher matrix of the predictions, estimated from
  gradients of `log p(y)` for next tokens `y` drawn from the model itself. It also tells heads apart.

The changes are those of the real store: quantized, packed, read back. `optimal_bits` turns costs into widths by
rate-distortion allocation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from helpers.metrics import kl_divergence
from helpers.packed_store import CENTRE_TOKENS, PackedStore
from helpers.quantization import WIDTHS

HORIZON = 64


class _TappedLayer(DynamicLayer):
    """Adds to the keys and values of a forward two zero tensors, whose gradients are those of keys and values."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.taps = [torch.zeros_like(x, requires_grad=True) for x in (key_states, value_states)]
        return super().update(key_states + self.taps[0], value_states + self.taps[1])


@dataclass
class TextStates:
    """Keys and values `[L, 1, H, T, D]` of one text in full precision, and the store that codes them."""

    keys: torch.Tensor
    values: torch.Tensor
    store: PackedStore

    def stored(self, side: str, bits: int) -> torch.Tensor:
        """Keys or values as they come back from storage at `bits`, `[L, 1, H, T, D]`."""
        states = self.keys if side == "key" else self.values
        return self.store.decode(self.store.encode(states, side, bits), side, bits, slice(None)).to(states.dtype)

    def change(self, side: str, bits: int) -> torch.Tensor:
        """What storing at `bits` changes, `[L, 1, H, T, D]`."""
        return self.stored(side, bits) - (self.keys if side == "key" else self.values)


def text_states(cache: Cache, quantizer: str = "rotated") -> TextStates:
    """Keys and values that a full-precision forward left in `cache` (one row), with a store centred on them.

    Raises `ValueError` for models whose layers differ in shape, and for texts too short to be centred.
    """
    keys, values = ([getattr(layer, name).detach()[:1] for layer in cache.layers] for name in ("keys", "values"))
    if len({(k.shape, v.shape) for k, v in zip(keys, values, strict=True)}) > 1:
        raise ValueError("sensitivity needs a model whose layers have keys and values of one shape")
    if keys[0].shape[2] < CENTRE_TOKENS:
        raise ValueError(f"a text needs {CENTRE_TOKENS} tokens or more, got {keys[0].shape[2]}")
    keys, values = torch.stack(keys), torch.stack(values)
    store = PackedStore(list(range(len(keys))), keys[0], values[0], quantizer)
    if quantizer == "rotated":
        store.set_centre(keys[:, :, :, :CENTRE_TOKENS], torch.ones(1, CENTRE_TOKENS, device=keys.device))
    return TextStates(keys, values, store)


class FisherGradients:
    """Gradients of a text's predictions by its keys and values, one segment of predictions at a time.

    `ids` `[T]`; `samples` draws of next tokens; `segments` are runs of `segment` predictions. Iterating yields
    (segment, keys' gradients, values' gradients), each `[L, S, H, t, D]` with `t` the tokens that the segment sees.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int], segment: int, samples: int, seed: int = 0):
        self.segment = segment
        rows = torch.tensor([list(ids)], device=model.device).expand(samples, -1)
        generator = torch.Generator(device=model.device).manual_seed(seed)
        self.cache = Cache(layers=[_TappedLayer() for _ in range(model.config.get_text_config().num_hidden_layers)])
        with torch.enable_grad():
            log_p = model(input_ids=rows, cache=self.cache).logits.float().log_softmax(-1)
            drawn = torch.multinomial(log_p.detach().exp().flatten(0, 1), 1, generator=generator)
            self.log_likelihood = log_p.flatten(0, 1).gather(1, drawn).view(rows.shape)
        self.states = text_states(self.cache)

    def __iter__(self):
        taps = [tap for layer in self.cache.layers for tap in layer.taps]
        for start in range(0, self.log_likelihood.shape[1], self.segment):
            stop = start + self.segment
            part = self.log_likelihood[:, start:stop].sum()
            gradients = [g[:, :, :stop] for g in torch.autograd.grad(part, taps, retain_graph=True)]
            yield start, torch.stack(gradients[0::2]), torch.stack(gradients[1::2])


def fisher_costs(
    model: PreTrainedModel,
    ids: Sequence[int],
    widths: Sequence[int] = WIDTHS,
    horizon: int = HORIZON,
    samples: int = 8,
    segment: int = 16,
    seed: int = 0,
) -> np.ndarray:
    """Estimated rise of KL (nats, summed over about `horizon` following predictions), `[T, widths]`.

    The horizon is counted in whole segments of predictions: a token's own segment and the `horizon / segment` next.
    """
    gradients = FisherGradients(model, ids, segment, samples, seed)
    changes = [(gradients.states.change("key", b), gradients.states.change("value", b)) for b in widths]
    costs = torch.zeros(len(ids), len(widths), dtype=torch.float64)
    own = torch.arange(len(ids)) // segment
    for start, by_key, by_value in gradients:
        seen = by_key.shape[3]
        near = start // segment - own[:seen] <= horizon // segment
        for column, (key, value) in enumerate(changes):
            rise = torch.einsum("lshtd,lohtd->st", by_key, key[:, :, :, :seen])
            rise += torch.einsum("lshtd,lohtd->st", by_value, value[:, :, :, :seen])
            costs[:seen, column] += rise.square().mean(0).div(2).cpu() * near
    return costs.numpy()


class _PerturbedLayer(DynamicLayer):
    """Holds a prefix, and puts one extra slot a row behind the new tokens: a token as another width stores it."""

    def __init__(self, prefix: tuple[torch.Tensor, torch.Tensor], extra: tuple[torch.Tensor, torch.Tensor]):
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
    states = text_states(full)
    stored = {bits: (states.stored("key", bits), states.stored("value", bits)) for bits in widths}
    costs = np.zeros((len(tokens), len(widths)))
    pairs = sorted((t, i, w) for i, t in enumerate(tokens) for w in range(len(widths)))
    while pairs:
        first = pairs[0][0]
        group = [p for p in pairs[:batch] if p[0] < first + 16]  # tokens close together share a window
        pairs = pairs[len(group) :]
        at = torch.tensor([t for t, _, _ in group], device=model.device)
        stop = min(len(ids), int(at.max()) + 1 + horizon)
        window = torch.arange(first, stop, device=model.device)
        layers = []
        for layer in range(len(states.keys)):
            prefix = (states.keys[layer][:, :, :first], states.values[layer][:, :, :first])
            extra = [
                torch.cat([stored[widths[w]][side][layer][:, :, t : t + 1] for t, _, w in group]) for side in (0, 1)
            ]
            layers.append(_PerturbedLayer(prefix, tuple(extra)))
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


def optimal_bits(
    costs: np.ndarray, average: float, widths: Sequence[int] = WIDTHS, tolerance: float = 1e-3
) -> tuple[np.ndarray, float]:
    """Widths `[T]` that minimise `cost + lambda * bits` for each token, and the lambda that gives the `average`.

    `costs` `[T, widths]` in nats. The average is met as closely as one lambda for all tokens allows. Raises
    `ValueError` where `average` is outside the widths, or `costs` are not finite.
    """
    costs = np.asarray(costs, dtype=np.float64)
    bits = np.asarray(widths)
    if costs.ndim != 2 or costs.shape[1] != len(bits) or not len(costs):
        raise ValueError(f"costs must have shape [tokens, {len(bits)}], got {list(costs.shape)}")
    if not np.isfinite(costs).all():
        raise ValueError("costs hold NaN or infinity")
    if not bits.min() <= average <= bits.max():
        raise ValueError(f"average must lie between {bits.min()} and {bits.max()} bits, got {average}")
    low, high = 0.0, float(np.ptp(costs) / np.diff(np.sort(bits)).min()) + 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        chosen = bits[(costs + middle * bits).argmin(1)]
        if abs(chosen.mean() - average) <= tolerance or high - low < 1e-15:
            break
        low, high = (middle, high) if chosen.mean() > average else (low, middle)
    return chosen, middle


def head_costs(
    model: PreTrainedModel,
    ids: Sequence[int],
    moves: Sequence[tuple[tuple[int, int], tuple[int, int], int]],
    block: int = 16,
    samples: int = 4,
    segment: int = 64,
    seed: int = 0,
) -> list[np.ndarray]:
    """Estimated rise of KL when one head alone moves one token to other widths, `[L, H, T]` for each of `moves`.

    A move is (source, target, after), widths as (key bits, value bits). The rise is summed over the segments of
    predictions that begin once `after` blocks have followed the token's own, to the end of the text; NaN for tokens
    that no such segment follows.
    """
    gradients = FisherGradients(model, ids, segment, samples, seed)
    states = gradients.states
    changes = [
        tuple(states.stored(s, t) - states.stored(s, f) for s, f, t in zip(("key", "value"), source, target))
        for source, target, _ in moves
    ]
    layers, _, heads, tokens, _ = states.keys.shape
    own = torch.arange(tokens) // block
    costs = [torch.full((layers, heads, tokens), torch.nan, dtype=torch.float64) for _ in moves]
    for start, by_key, by_value in gradients:
        seen = by_key.shape[3]
        for cost, (key, value), (_, _, after) in zip(costs, changes, moves):
            rise = (by_key * key[:, :, :, :seen]).sum(-1) + (by_value * value[:, :, :, :seen]).sum(-1)
            rise = rise.square().mean(1).div(2).double().cpu()
            counted = (own[:seen] + 1 + after) * block <= start
            cost[:, :, :seen] = torch.where(counted, cost[:, :, :seen].nan_to_num(0.0) + rise, cost[:, :, :seen])
    return [cost.numpy() for cost in costs]
