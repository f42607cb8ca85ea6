"""Texts cut into sequences of equal length, on which quality is measured and controllers are trained."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from helpers.models.tokens import pack_tokens

ENOUGH = 64  # characters of text for a token that is wanted: beyond that, texts are left out before they are encoded


def take_sequences(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int, most: int) -> list[list[int]]:
    """`most` sequences of `length` token ids, evenly spaced over those that the texts give, or all if there are fewer.

    So a few rows do not all come from one article. Of very many texts, evenly spaced ones are encoded. Raises
    `ValueError` where there are less than `length` tokens.
    """
    if most < 1:
        raise ValueError(f"the number of sequences must be 1 or more, got {most}")
    if not texts:
        raise ValueError("there is no text to read")
    every = min(sum(map(len, texts)) // (ENOUGH * length * most), len(texts) // (16 * most))
    sequences = pack_tokens(tokenizer(list(texts[:: max(1, every)]), verbose=False)["input_ids"], length)
    if not sequences:
        raise ValueError(f"the {len(texts)} texts that are read hold less than {length} tokens")
    return sequences[:: max(1, len(sequences) // most)][:most]
