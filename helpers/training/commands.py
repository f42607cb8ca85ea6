"""Commands of this package: `python main.py collect`, `train` and `calibrate-keys`; `pretrain` is in `pretraining`."""

from dataclasses import dataclass
from pathlib import Path

from helpers.cache import Balance
from helpers.io import relative_to_root
from helpers.io.processes import is_main_process, one_first
from helpers.models import (
    KEY_BALANCE,
    balance_path,
    encode,
    load_model,
    load_stories,
    sample_items,
    save_balance,
    take_sequences,
)
from helpers.models.sources import Sources
from helpers.policies import EntropyRule
from helpers.training import collection
from helpers.training.controllers import train_controllers
from helpers.training.key_moments import BLOCK, SINKS, key_harm, key_moments
from helpers.training.rule import calibrate_rule
from helpers.training.table import summarise


@dataclass(frozen=True)
class CollectOptions(Sources):
    """What `collect` reads; the texts are multiple-choice items or any running text."""

    count: int = 24  # number of texts
    max_tokens: int = 256  # tokens of each text that are read
    block: int = 16  # tokens that are quantized together
    # Of the rule, three rising entropies in nats, as the assignment's 2 4 6; by default quantiles of these texts.
    thresholds: tuple[float, float, float] | None = None


def collect(options: CollectOptions) -> None:
    """Write the training table of Part 1 and print its summary."""
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.multiple_choice)
    with one_first():
        found = load_stories(texts_source, preset.train_split)
        texts = sample_items(found, options.count, options.seed)
        model, tokenizer = load_model(source, quiet=not is_main_process())
    ids = [encode(tokenizer, text, options.max_tokens) for text in texts]
    out = Path(options.out or preset.data_dir / "controller_training.csv")
    names = {"model": relative_to_root(source), "source": relative_to_root(texts_source), "split": found.split}
    names["preset"] = preset.name
    rule = EntropyRule(options.thresholds) if options.thresholds else calibrate_rule(model, ids)
    table = collection.collect(model, ids, out, rule, options.block, names)
    if is_main_process():
        rule.save(out.parent / "controllers", names)
        print(summarise(table))
        print(f"\n{len(table)} tokens of {len(ids)} texts -> {relative_to_root(out)}")


@dataclass(frozen=True)
class TrainOptions(Sources):
    """What `train` reads."""

    rows: int = 40  # sequences of 512 tokens of the training part of the texts, evenly spaced


def train(options: TrainOptions) -> None:
    """Collect on short pieces of the texts, then fit and write all controllers of a model."""
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.stories)
    texts = load_stories(texts_source, preset.train_split)
    model, tokenizer = load_model(source)
    sequences = take_sequences(tokenizer, texts, 512, options.rows)
    out = Path(options.out or preset.data_dir / "controllers")
    short = [ids[:256] for ids in sequences[:: max(1, len(sequences) // 24)]]
    names = {"model": relative_to_root(source), "source": relative_to_root(texts_source), "split": texts.split}
    rule = calibrate_rule(model, short)
    rule.save(out, names)
    table = collection.collect(model, short, out / "collected.csv", rule, source=names)
    summary = train_controllers(model, table, sequences, out, names["model"], options.seed)
    print(summary.to_string(index=False))
    print(f"controllers of {len(table)} tokens and {len(sequences)} sequences of 512 -> {relative_to_root(out)}")


@dataclass(frozen=True)
class CalibrateOptions(Sources):
    """What `calibrate-keys` reads."""

    rows: int = 8  # sequences of the training part of the texts, evenly spaced
    length: int = 512  # tokens of a sequence


def calibrate_keys(options: CalibrateOptions) -> None:
    """Measure how a model's queries and keys lie, and write the maps that balance its keys."""
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.stories)
    texts = load_stories(texts_source, preset.train_split)
    model, tokenizer = load_model(source, balanced=False)
    sequences = take_sequences(tokenizer, texts, options.length, options.rows)
    query, key = key_moments(model, sequences)
    balance = Balance.of_moments(query, key)
    about = {"source": relative_to_root(source), "texts": relative_to_root(texts_source), "split": texts.split}
    about |= {"rows": len(sequences), "length": options.length, "sinks": SINKS, "block": BLOCK}
    path = save_balance(balance, options.out or balance_path(source) or preset.data_dir / KEY_BALANCE, model, about)
    gain = (key_harm(query, key) / key_harm(query, key, balance.matrices.double())).flatten()
    print(f"an error of keys does {float(gain.median()):.1f} times less harm (median of {len(gain)} heads)")
    print(f"-> {relative_to_root(path)}")
