"""Prompts of a study: articles cut to fit both models."""

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.prompts import prompt_ids
from helpers.models import Article
from helpers.models.tokens import context_length


def fit_prompts(
    articles: Sequence[Article],
    template: str,
    readers: list[tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    max_new_tokens: int,
    max_prompt_tokens: int = 1024,
) -> tuple[list[str], int]:
    """Articles as prompts, cut from the end where they would not fit any of the models, and how many were cut."""
    room = max_prompt_tokens
    for model, tokenizer in readers:
        limit = context_length(model) or room
        frame = len(prompt_ids(tokenizer, template.format(article=".")))
        # Tokens at a cut may join differently than in the whole text: 8 to spare.
        room = min(room, limit - max_new_tokens - frame - 8)
    if room < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a prompt in the context of the models")
    prompts, cut, tokenizer = [], 0, readers[0][1]
    for article in articles:
        ids = tokenizer(article.article, add_special_tokens=False)["input_ids"]
        text = article.article if len(ids) <= room else tokenizer.decode(ids[:room])
        prompts.append(template.format(article=text))
        cut += len(ids) > room
    return prompts, cut


def sample_articles(articles: list[Article], count: int, seed: int = 0, held_out: int = 0) -> list[list[Article]]:
    """`count` articles in seeded random order, and up to `held_out` others to correct a threshold on."""
    if not 0 < count <= len(articles):
        raise ValueError(f"count must lie between 1 and the number of articles ({len(articles)}), got {count}")
    order = random.Random(seed).sample(articles, len(articles))
    return [order[:count], order[count : count + held_out]]
