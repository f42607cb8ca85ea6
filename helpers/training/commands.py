"""The commands of this package: `python main.py collect`, `train` and `pretrain`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerFast

from helpers.io.paths import relative_to_root
from helpers.io.processes import is_main_process, one_first
from helpers.models.items import load_multiple_choice, sample_texts
from helpers.models.loading import load_model
from helpers.models.presets import get_preset
from helpers.models.sequences import load_sequences
from helpers.models.sources import Sources
from helpers.models.stories import load_stories, read_stories, split_holdout
from helpers.models.tokens import encode
from helpers.policies.rules import EntropyRule
from helpers.training import collection
from helpers.training.controllers import train_controllers
from helpers.training.table import summarise
from helpers.training.tokenizer import train_tokenizer


@dataclass(frozen=True)
class CollectOptions(Sources):
    """What `collect` reads; the texts are multiple-choice items."""

    count: int = 24  # number of texts
    max_tokens: int = 256  # tokens of each text that are read
    block: int = 16  # tokens that are quantized together


def collect(options: CollectOptions) -> None:
    """Write the training table of Part 1 and print its summary."""
    preset = get_preset(options.preset)
    source, texts_source = options.model or preset.model, options.texts or preset.multiple_choice
    with one_first():
        model, tokenizer = load_model(source, quiet=not is_main_process())
        items = load_multiple_choice(texts_source, preset.train_split)
    texts = sample_texts(items, options.count, options.seed)
    ids = [encode(tokenizer, text, options.max_tokens) for text in texts]
    out = Path(options.out or preset.data_dir / "controller_training.csv")
    names = {"model": relative_to_root(source), "source": relative_to_root(texts_source), "preset": preset.name}
    table = collection.collect(model, ids, out, EntropyRule(), options.block, names)
    if is_main_process():
        print(summarise(table))
        print(f"\n{len(table)} tokens of {len(ids)} texts -> {relative_to_root(out)}")


@dataclass(frozen=True)
class TrainOptions(Sources):
    """What `train` reads."""

    rows: int = 40  # sequences of 512 tokens of the first nine tenths of the texts


def train(options: TrainOptions) -> None:
    """Collect on short pieces of the texts, then fit and write all controllers of a model."""
    preset = get_preset(options.preset)
    source, texts = options.model or preset.model, options.texts or preset.stories
    model, tokenizer = load_model(source)
    sequences = load_sequences(tokenizer, texts, 512, options.rows, preset.train_split, 0.1, held_out=False)
    out = Path(options.out or preset.data_dir / "controllers")
    short = [ids[:256] for ids in sequences[:: max(1, len(sequences) // 24)]]
    names = {"model": relative_to_root(source)}
    table = collection.collect(model, short, out / "collected.csv", EntropyRule(), source=names)
    summary = train_controllers(model, table, sequences, out, names["model"], options.seed)
    print(summary.to_string(index=False))
    print(f"controllers of {len(table)} tokens and {len(sequences)} sequences of 512 -> {relative_to_root(out)}")


@dataclass(frozen=True)
class PretrainOptions:
    """Texts, size and settings of a story model."""

    out: str  # folder of the finished model
    text: tuple[str, ...] = ("roneneldan/TinyStories",)  # story files (.txt, .txt.gz) or hub data sets
    holdout_text: str | None = None  # story file whose last tenth is held out and whose rest is trained on
    size: Literal["large", "small"] = "large"
    tokenizer: str | None = None  # folder with a tokenizer to reuse; without it one is trained
    vocab_size: int = 2048
    steps: int | None = None
    batch: int | None = None
    seed: int | None = None
    checkpoint_every: int = 500


def pretrain(options: PretrainOptions) -> None:
    """Train a story model from text files to a folder in Hugging Face format."""
    from helpers.training import pretraining  # imports accelerate, which no other command needs

    changed = {k: v for k in ("steps", "batch", "seed") if (v := getattr(options, k)) is not None}
    settings = replace(pretraining.SIZES[options.size], **changed)
    stories = [story for source in options.text for story in load_stories(source)]
    if options.holdout_text:
        kept, holdout = split_holdout(read_stories(options.holdout_text))
        stories += kept
    else:
        stories, holdout = split_holdout(stories, 0.01)
    if options.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.tokenizer)
    else:
        tokenizer = train_tokenizer(stories, options.vocab_size, settings.context)
    result = pretraining.train(tokenizer, stories, holdout, options.out, settings, options.checkpoint_every)
    print(json.dumps(result, indent=2))
