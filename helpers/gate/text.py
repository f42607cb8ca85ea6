"""A generated text: what was written, by whom, and how long it took."""

from dataclasses import dataclass, field

import pandas as pd
from transformers import PreTrainedTokenizerBase

SMALL, LARGE = "small", "large"


@dataclass
class Generated:
    """A text and how it came about; the lists have one entry a token, in order.

    `signal` is what the gate saw when the token was decided (NaN without a gate). `seconds` is the whole
    time, the prompt included; `first_token_seconds` the time until the first token stood. `discarded` counts the
    tokens that `rollbacks` took back.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    authors: list[str] = field(default_factory=list)  # "small" or "large"
    signal: list[float] = field(default_factory=list)
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    large_calls: int = 0
    rollbacks: int = 0
    discarded: int = 0

    @property
    def usage(self) -> float:
        """Share of the tokens that the large model wrote."""
        return self.authors.count(LARGE) / len(self.authors) if self.authors else 0.0


def trace(result: Generated, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """One row a token of a gated text: `step`, `token_id`, `token` (text), `signal`, `fired` and `author`.

    A token that a rollback put in has the large model as author although the gate had not fired: `fired` is by
    author, `signal` what the small model said.
    """
    return pd.DataFrame(
        {
            "step": range(len(result.token_ids)),
            "token_id": result.token_ids,
            "token": [tokenizer.decode([token]) for token in result.token_ids],
            "signal": result.signal,
            "fired": [author == LARGE for author in result.authors],
            "author": result.authors,
        }
    )
