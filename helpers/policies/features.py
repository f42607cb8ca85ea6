"""What a policy may know of a token: formulae over predictions, and the record that holds them.

A token's features exist once the model has read it: its entropy is that of the prediction made *after* it. Nothing
here knows of caches or policies.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """`ln p` of next-token distributions: logits `[..., vocabulary]` to the same shape, in float32 at least."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def entropy_of(log_p: torch.Tensor) -> torch.Tensor:
    """Entropy in nats, `H = -sum p ln p`, of log-probabilities `[..., vocabulary]`; gives `[...]`.

    Between 0 and `ln(vocabulary)`. Entries of -inf count as p = 0.

    >>> round(entropy_of(log_probabilities(torch.zeros(4))).item(), 4)  # uniform over 4: ln 4
    1.3863
    """
    lowest = torch.finfo(log_p.dtype).min  # in place of -inf: p ln p is 0 where p is 0
    return -(log_p.exp() * log_p.clamp(min=lowest)).sum(dim=-1).clamp(max=0)


def confidence_of(log_p: torch.Tensor) -> torch.Tensor:
    """Largest probability, `max p`, of log-probabilities `[..., vocabulary]`; gives `[...]`."""
    return log_p.amax(dim=-1).exp()


def surprisal_of(log_p: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """`-ln p` of the tokens `[...]` under the predictions `[..., vocabulary]` made before them."""
    return -log_p.gather(-1, token_ids[..., None])[..., 0]


@dataclass
class TokenFeatures:
    """Features of a run of tokens, float32 `[batch, tokens]` each; None where nobody asked for them."""

    entropy: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    rarity: torch.Tensor | None = None
    attn_var: torch.Tensor | None = None  # spread of the attention that the token paid, see `row_variance`
    surprisal: torch.Tensor | None = None  # of the token itself, nats; 0 for the first of a text
    key_error: torch.Tensor | None = None  # relative squared error at 2 bits, mean over layers and heads
    value_error: torch.Tensor | None = None

    def slice(self, start: int, stop: int | None) -> "TokenFeatures":
        """Features of the tokens from `start` up to `stop` (None: to the end)."""
        known = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return TokenFeatures(**{name: value[:, start:stop] for name, value in known.items()})

    @staticmethod
    def join(parts: Iterable["TokenFeatures"]) -> "TokenFeatures":
        """The tokens of all `parts`, one after another."""
        parts, joined = list(parts), {}
        for f in fields(TokenFeatures):
            known = [value for part in parts if (value := getattr(part, f.name)) is not None]
            joined[f.name] = torch.cat(known, dim=1) if known else None
        return TokenFeatures(**joined)
