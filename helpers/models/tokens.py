"""From texts to token ids, and the checks on them: that there are any, and that they fit a model's context."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int | None = None) -> list[int]:
    """Token ids of one text with the special tokens that the model expects, cut to `max_tokens`.

    Raises `ValueError` for a text that holds nothing but white space.
    """
    if not text.strip():
        raise ValueError("text is empty: there is nothing to read")
    return tokenizer(text, truncation=max_tokens is not None, max_length=max_tokens)["input_ids"]


def context_length(model: PreTrainedModel) -> int | None:
    """How many tokens `model` can read, None where its configuration names no limit."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_context(model: PreTrainedModel, tokens: int, max_new_tokens: int = 0, name: str | None = None) -> None:
    """Raise `ValueError` where a text and what is to be written do not fit into the context of `model`.

    The message calls it the `name` model, by default by its type.
    """
    limit = context_length(model)
    if limit is not None and tokens + max_new_tokens > limit:
        written = f" and max_new_tokens={max_new_tokens}" if max_new_tokens else ""
        raise ValueError(
            f"a text of {tokens} tokens{written} does not fit into the context of "
            f"{f'the {name}' if name else f'this {model.config.model_type}'} model ({limit} tokens): cut it"
        )


def pack_tokens(token_ids: Iterable[list[int]], length: int) -> list[list[int]]:
    """Concatenate token lists and cut them into sequences of exactly `length`; what is left over is dropped."""
    flat = [token for ids in token_ids for token in ids]
    return [flat[i : i + length] for i in range(0, len(flat) - length + 1, length)]


def check_not_empty(input_ids: torch.Tensor) -> None:
    """Raise `ValueError` where there is no token."""
    if not input_ids.numel():
        raise ValueError("input_ids holds no token: there is nothing to read")
