"""What a policy may know of a token: formulae over logits, token ids and attention weights.

A token's features exist once the model has read it: its entropy is that of the prediction made *after* it. Nothing
here knows of caches or policies.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch

from helpers.cache.attention.variance import row_variance


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of the next-token distribution in nats, `H = -sum p ln p`, computed in float32 at least.

    `logits` `[..., vocabulary]`, gives `[...]`; between 0 and `ln(vocabulary)`. Entries of -inf count as p = 0.

    >>> round(entropy(torch.zeros(4)).item(), 4)  # uniform over 4: ln 4
    1.3863
    """
    return entropy_of(log_probabilities(logits))


def confidence(logits: torch.Tensor) -> torch.Tensor:
    """Largest next-token probability, `max p`; `[..., vocabulary]` to `[...]` in float32 at least."""
    return confidence_of(log_probabilities(logits))


def surprisal(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`-ln p` of the tokens `[...]` under the predictions `[..., vocabulary]` made before them, in float32 at least."""
    return surprisal_of(log_probabilities(logits), token_ids)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """`ln p` of the next-token distributions `[..., vocabulary]`, in float32 at least.

    Whoever wants several features of one prediction computes it once, for the three functions below.
    """
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def entropy_of(log_p: torch.Tensor) -> torch.Tensor:
    """`entropy` of log-probabilities `[..., vocabulary]`."""
    lowest = torch.finfo(log_p.dtype).min  # in place of -inf: p ln p is 0 where p is 0
    return -(log_p.exp() * log_p.clamp(min=lowest)).sum(dim=-1).clamp(max=0)


def confidence_of(log_p: torch.Tensor) -> torch.Tensor:
    """`confidence` of log-probabilities `[..., vocabulary]`."""
    return log_p.amax(dim=-1).exp()


def surprisal_of(log_p: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`surprisal` of tokens `[...]` under log-probabilities `[..., vocabulary]`."""
    return -log_p.gather(-1, token_ids[..., None])[..., 0]


def attention_variance(weights: torch.Tensor) -> torch.Tensor:
    """Spread of the attention rows: population variance over the keys a query sees, then the mean over heads.

    `weights` `[..., heads, queries, keys]`, rows summing to 1 and the last query seeing all keys (causal); gives
    `[..., queries]`. A query that sees `n` keys has `sum p^2 / n - 1 / n^2`: 0 for even attention, at most
    `(n - 1) / n^2` for attention to one key. The features use the last layer's.
    """
    queries, keys = weights.shape[-2:]
    seen = torch.arange(keys - queries + 1, keys + 1, device=weights.device)
    return row_variance(weights, seen).mean(dim=-2)


@dataclass
class TokenFeatures:
    """Features of a run of tokens, float32 `[batch, tokens]` each; None where nobody asked for them."""

    entropy: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    rarity: torch.Tensor | None = None
    attn_var: torch.Tensor | None = None
    surprisal: torch.Tensor | None = None  # of the token itself, nats; 0 for the first of a text
    key_error: torch.Tensor | None = None  # relative squared error at 2 bits, mean over layers and heads
    value_error: torch.Tensor | None = None

    def slice(self, start: int, stop: int | None) -> "TokenFeatures":
        """Features of the tokens from `start` up to `stop` (None: to the end)."""
        return self._map(lambda value: value[:, start:stop])

    @staticmethod
    def join(parts: Iterable["TokenFeatures"]) -> "TokenFeatures":
        """The tokens of all `parts`, one after another."""
        parts, joined = list(parts), {}
        for f in fields(TokenFeatures):
            known = [value for part in parts if (value := getattr(part, f.name)) is not None]
            joined[f.name] = torch.cat(known, dim=1) if known else None
        return TokenFeatures(**joined)

    def _map(self, function) -> "TokenFeatures":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenFeatures(**{k: None if v is None else function(v) for k, v in values.items()})
