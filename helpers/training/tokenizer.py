"""The tokenizer of the embedded models."""

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from helpers.models.stories import STORY_SEPARATOR


def train_tokenizer(stories: list[str], vocab_size: int = 2048, context: int = 512) -> PreTrainedTokenizerFast:
    """Byte-level BPE over `stories`; token 0 is the separator and serves as beginning, end and padding of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[STORY_SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(stories, trainer)
    separator = (STORY_SEPARATOR, tokenizer.token_to_id(STORY_SEPARATOR))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{STORY_SEPARATOR} $A", special_tokens=[separator])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=STORY_SEPARATOR,
        eos_token=STORY_SEPARATOR,
        pad_token=STORY_SEPARATOR,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def encode_stories(tokenizer: PreTrainedTokenizerFast, stories: list[str]) -> np.ndarray:
    """One flat array of token ids, a separator before every story."""
    flat: list[int] = []
    for start in range(0, len(stories), 1000):
        for ids in tokenizer(stories[start : start + 1000], verbose=False)["input_ids"]:
            flat.extend(ids)
    return np.array(flat, dtype=np.int32)
