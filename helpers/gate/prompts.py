"""Prompts of two models: chat templates, one vocabulary, articles cut to fit both, and the tokens that end a text."""

import random
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.models import Article, encode
from helpers.models.tokens import context_length


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt as the model of this tokenizer expects it: in its chat template if it has one.

    Raises `ValueError` for a prompt of white space.
    """
    if not tokenizer.chat_template:
        return encode(tokenizer, prompt)
    if not prompt.strip():
        raise ValueError("prompt is empty: there is nothing to go on from")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def check_same_tokens(small: PreTrainedTokenizerBase, large: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError` that says what differs unless both tokenizers give the same ids the same meaning."""
    if small is large:
        return
    ours, theirs = small.get_vocab(), large.get_vocab()
    differ = next((token for token, at in ours.items() if theirs.get(token, at) != at), None)
    only = next(iter(ours.keys() ^ theirs.keys()), None)
    reason = None
    if len(ours) != len(theirs):
        reason = f"the small model's has {len(ours)} tokens and the large one's {len(theirs)}"
    elif only is not None:
        reason = f"token {only!r} is only in the {'small' if only in ours else 'large'} model's"
    elif differ is not None:
        reason = (
            f"token {differ!r} is number {ours[differ]} in the small model's and {theirs[differ]} in the large one's"
        )
    elif small.eos_token_id != large.eos_token_id:
        reason = f"texts end with {small.eos_token!r} in the small model's and {large.eos_token!r} in the large one's"
    if reason:
        raise ValueError(f"the two models must share one tokenizer, since they read each other's tokens: {reason}")


def end_tokens(*models: PreTrainedModel) -> set[int]:
    """Token ids that end a text for any of the models."""
    ends: set[int] = set()
    for model in models:
        ids = model.generation_config.eos_token_id
        ends |= set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
    return ends


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
