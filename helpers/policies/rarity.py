"""Rarity of tokens from running counts."""

from collections import Counter
from collections.abc import Iterable

import torch


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
