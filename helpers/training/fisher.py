"""What storing tokens at a width does to later predictions, estimated: no run for each token, as `exact` needs.

To second order the rise of KL is `d F d / 2`, with `d` the change of keys and values and `F` the Fisher information of
the predictions: the mean square of the gradients of drawn next tokens. A few backward passes a text serve all tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from helpers.cache import WIDTHS
from helpers.training.exact import HORIZON
from helpers.training.states import text_states


class _TappedLayer(DynamicLayer):
    """Adds to the keys and values of a forward two zero tensors, whose gradients are those of keys and values."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self.taps = [torch.zeros_like(x, requires_grad=True) for x in (key_states, value_states)]
        return super().update(key_states + self.taps[0], value_states + self.taps[1])


class FisherGradients:
    """Gradients of a text's predictions by its keys and values, one segment of predictions at a time.

    `ids` `[T]`; `samples` draws of next tokens; `segments` are runs of `segment` predictions. Iterating yields
    (start of the segment, (keys' gradients, values' gradients)), each `[L, S, H, t, D]` with `t` the tokens that the
    segment sees.
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
        self.states = text_states(self.cache, model.config)

    def __iter__(self):
        taps = [tap for layer in self.cache.layers for tap in layer.taps]
        for start in range(0, self.log_likelihood.shape[1], self.segment):
            stop = start + self.segment
            with torch.enable_grad():
                part = self.log_likelihood[:, start:stop].sum()
            gradients = [g[:, :, :stop] for g in torch.autograd.grad(part, taps, retain_graph=True)]
            yield start, (torch.stack(gradients[0::2]), torch.stack(gradients[1::2]))


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
    states = gradients.states
    changes = [[new - old for old, new in zip(states.full, states.stored(bits))] for bits in widths]
    costs = torch.zeros(len(ids), len(widths), dtype=torch.float64)
    own = torch.arange(len(ids)) // segment
    for start, sides in gradients:
        seen = sides[0].shape[3]
        near = start // segment - own[:seen] <= horizon // segment
        for column, change in enumerate(changes):
            rise = sum(torch.einsum("lshtd,lohtd->st", g, x[:, :, :, :seen]) for g, x in zip(sides, change))
            costs[:seen, column] += rise.square().mean(0).div(2).cpu() * near
    return costs.numpy()


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
        [new - old for old, new in zip(states.stored(source), states.stored(target))] for source, target, _ in moves
    ]
    layers, _, heads, tokens, _ = states.full[0].shape
    own = torch.arange(tokens) // block
    costs = [torch.full((layers, heads, tokens), torch.nan, dtype=torch.float64) for _ in moves]
    for start, sides in gradients:
        seen = sides[0].shape[3]
        for cost, change, (_, _, after) in zip(costs, changes, moves):
            rise = sum((g * x[:, :, :, :seen]).sum(-1) for g, x in zip(sides, change))
            rise = rise.square().mean(1).div(2).double().cpu()
            counted = (own[:seen] + 1 + after) * block <= start
            cost[:, :, :seen] = torch.where(counted, cost[:, :, :seen].nan_to_num(0.0) + rise, cost[:, :, :seen])
    return [cost.numpy() for cost in costs]
