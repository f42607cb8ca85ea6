"""Two commands of this package: `python main.py collect` and `train`; `pretrain` is in `pretraining`."""

from dataclasses import dataclass
from pathlib import Path

from helpers.io import relative_to_root
from helpers.io.processes import is_main_process, one_first
from helpers.models import encode, get_preset, load_model, load_multiple_choice, sample_texts
from helpers.models.sequences import load_sequences
from helpers.models.sources import Sources
from helpers.policies import EntropyRule
from helpers.training import collection
from helpers.training.controllers import train_controllers
from helpers.training.table import summarise


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
