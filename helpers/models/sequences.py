"""A text source cut into sequences of equal length, on which quality is measured and controllers are trained."""

from transformers import PreTrainedTokenizerBase

from helpers.models.stories import load_stories, split_holdout
from helpers.models.tokens import pack_tokens


def load_sequences(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    length: int,
    most: int,
    split: str | None = None,
    holdout: float = 1.0,
    held_out: bool = True,
) -> list[list[int]]:
    """At most `most` sequences of `length` token ids from a story file, an items file or a hub data set.

    Items (`.jsonl`) have splits: with `split`, all of that one is read. Of other texts the last share `holdout` is
    read, or without `held_out` the rest. Raises `ValueError` where that has less than `length` tokens.
    """
    stories = load_stories(source, split)
    if holdout < 1 and not (split and source.endswith(".jsonl")):
        stories = split_holdout(stories, holdout)[int(held_out)]
    sequences = pack_tokens(tokenizer(stories, verbose=False)["input_ids"], length)[:most]
    if not sequences:
        raise ValueError(f"--texts {source}: less than {length} tokens in the share that is read")
    return sequences
