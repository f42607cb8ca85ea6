"""The two models of a gate: what a pair is, and how that of a preset is loaded."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.prompts import check_same_tokens
from helpers.models import Preset, load_model

Pair = tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]  # small, large, and their shared tokenizer


def load_pair(preset: Preset) -> tuple[Pair, PreTrainedTokenizerBase]:
    """The pair of a preset, and the large model's own tokenizer, which may have another chat template.

    Raises `ValueError` for a preset without a pair, and for tokenizers that differ.
    """
    if preset.without_pair:
        raise ValueError(preset.without_pair)
    small, tokenizer = load_model(preset.gate_small)
    large, large_tokenizer = load_model(preset.gate_large)
    check_same_tokens(tokenizer, large_tokenizer)
    return (small, large, tokenizer), large_tokenizer
