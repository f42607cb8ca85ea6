"""What a policy may know of a token: formulae over logits, token ids and attention weights.

A token's features exist once the model has read it: its entropy is that of the prediction made *after* it. Nothing
here knows of caches or policies.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch


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


def row_variance(weights: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Population variance of attention rows `[..., Q, keys]` over the `seen` `[..., Q]` keys that each may see.

    Keys that a query may not see have weight 0 and are not counted; a row that sees none (padding) has variance 0.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    seen = seen.clamp(min=1).to(weights.dtype)
    return (weights.square().sum(-1) / seen - 1 / seen.square()).clamp(min=0)


def received_attention(weights: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Attention that each key received, summed over queries and over the query heads that share its KV head.

    `weights` `[..., heads, queries, keys]`, gives `[..., kv_heads, keys]` (ZipCache and H2O rank tokens by it).
    """
    return weights.unflatten(-3, (kv_heads, -1)).sum(dim=(-3, -2))


class TokenCounts:
    """Running counts of token ids, for rarity.

    The rarity of a token is `-ln((count + 1) / (N + V_seen + 1))` with its own count, the number of tokens and the
    number of distinct ones *before* it: 0 for the first token, `ln(2 i + 1)` for the i-th of a row of new ones.

    >>> [round(r, 6) for r in TokenCounts().rarity([7, 8, 9, 7])]
    [0.0, 1.098612, 1.609438, 1.252763]
    """

    def __init__(self, counts: dict[int, int] | None = None):
        self.counts = Counter(counts or {})
        self.total = sum(self.counts.values())

    def rarity(self, token_ids: Iterable[int]) -> list[float]:
        """Rarity of each token in turn, counting each before the next is looked at."""
        result = []
        for token in token_ids:
            result.append((self.total + len(self.counts) + 1) / (self.counts[token] + 1))
            self.counts[token] += 1
            self.total += 1
        return torch.tensor(result, dtype=torch.float64).log().tolist()

    def forget(self, token_ids: Iterable[int]) -> None:
        """Uncount tokens that `rarity` counted."""
        for token in token_ids:
            self.counts[token] -= 1
            self.total -= 1
            if not self.counts[token]:
                del self.counts[token]

    def copy(self) -> "TokenCounts":
        return TokenCounts(self.counts)


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
    def join(parts: "Iterable[TokenFeatures]") -> "TokenFeatures":
        """The tokens of all `parts`, one after another."""
        parts, joined = list(parts), {}
        for f in fields(TokenFeatures):
            known = [value for part in parts if (value := getattr(part, f.name)) is not None]
            joined[f.name] = torch.cat(known, dim=1) if known else None
        return TokenFeatures(**joined)

    def _map(self, function) -> "TokenFeatures":
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenFeatures(**{k: None if v is None else function(v) for k, v in values.items()})
