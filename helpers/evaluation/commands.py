"""The commands of this package that print and write tables: `quality`, `weights`, `compare`, `memory` and others."""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

from helpers.cache import key_balance_of, use_key_balance
from helpers.evaluation import fixed_widths
from helpers.evaluation.chat import chat_table, write_conversation
from helpers.evaluation.comparison import compare_methods, save_comparison, standard_pairs
from helpers.evaluation.facts import fact_summary, fact_table, fact_texts
from helpers.evaluation.key_bias import biased_keys
from helpers.evaluation.memory import DECODED, EMBEDDED, STOCK_LIMIT, memory_methods, memory_table
from helpers.evaluation.memory_targets import check_memory_targets, memory_targets_text
from helpers.evaluation.methods import (
    FullPrecision,
    PolicyName,
    chosen_methods,
    coding_methods,
    default_methods,
    multiple_choice_methods,
    seven_methods,
)
from helpers.evaluation.weights import weights_table
from helpers.io import ROOT, relative_to_root, write_table
from helpers.io.processes import is_main_process, one_first, process_count
from helpers.models import (
    Part,
    check_context,
    load_balance,
    load_last,
    load_model,
    load_multiple_choice,
    load_stories,
    model_name,
    sample_items,
    take_sequences,
)
from helpers.models.sources import Sources


@dataclass(frozen=True)
class QualityOptions(Sources):
    """What `quality` reads."""

    sequences: int = 200  # sequences that the model samples
    last: float = 0.1  # share of a file of texts, from the end, that is read
    max_rows: int = 200  # sequences of 512 tokens of text at most


def quality(options: QualityOptions) -> None:
    """Print and write what fixed widths cost on text that the model samples and on text that it did not write."""
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.stories)
    texts = load_last(texts_source, options.last, preset.test_split)
    model, tokenizer = load_model(source)
    ids = take_sequences(tokenizer, texts, 512, options.max_rows)
    sampled = fixed_widths.sample_sequences(model, options.sequences, 256, options.seed)
    held_out, text = torch.tensor(ids, device=model.device), "held-out text, positions 256-511"
    table = pd.concat([
        fixed_widths.quality_table(model, sampled, fixed_widths.SAMPLED_METHODS, "sampled"),
        fixed_widths.quality_table(model, held_out, fixed_widths.TEXT_METHODS, text, first=256),
    ])  # fmt: skip
    shown = table.round({c: 4 for c in table.columns if c.startswith(("kl", "acc"))} | {"stored_bits": 2})
    print(shown.drop(columns=["tokens"]).to_string(index=False))
    about = {"model": relative_to_root(source), "source": relative_to_root(texts_source), "split": texts.split}
    about["seed"] = options.seed
    write_table(options.out or preset.data_dir / f"quality_{model_name(source)}.csv", table, about)


@dataclass(frozen=True)
class WeightsOptions(Sources):
    """What `weights` reads."""

    items: str | None = None  # multiple-choice file or hub name instead of the preset's
    count: int = 500  # multiple-choice items, drawn at random; 0 for none
    rows: int = 24  # sequences of the testing part of the texts, evenly spaced
    length: int = 512  # tokens of a sequence; its second half counts


def weights(options: WeightsOptions) -> None:
    """Print and write what weights at 8 bits cost and gain on a CPU, against full precision."""
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.stories)
    items_source = options.find(options.items, preset.multiple_choice)
    found = load_multiple_choice(items_source, preset.test_split) if options.count else Part()
    texts = load_stories(texts_source, preset.test_split)
    full, tokenizer = load_model(source)
    int8, _ = load_model(source, weights="int8")
    sequences = torch.tensor(take_sequences(tokenizer, texts, options.length, options.rows))
    items = sample_items(found, min(options.count, len(found)), options.seed) if found else []
    table = weights_table(full, int8, tokenizer, sequences, items)
    print(table.round(4).to_string(index=False))
    about = {"model": relative_to_root(source), "source": relative_to_root(texts_source), "split": texts.split}
    about |= {"items": len(items), "seed": options.seed, "threads": torch.get_num_threads()}
    write_table(options.out or preset.data_dir / "weights_int8.csv", table, about, float_format="%.5g")


@dataclass(frozen=True)
class CompareOptions(Sources):
    """What `compare` reads and measures."""

    controllers: str | None = None  # folder of controllers instead of the preset's
    items: str | None = None  # multiple-choice file or hub name instead of the preset's
    count: int = 200  # multiple-choice items, drawn at random; 0 for none
    max_rows: int = 200  # sequences of the testing part of the texts at most, evenly spaced
    length: int = 512  # tokens of a sequence; its second half counts
    # All; what answers the assignment; what chooses endings; or static storage without and with our coding of keys.
    methods: Literal["all", "seven", "choices", "coding"] = "all"
    balance: str | None = None  # file of balanced keys instead of the model's own
    key_bias: float = 0.0  # constant that is added to every key's slowest pair, as models with biased keys have
    rounds: int = 3  # rounds of timed decoding; 0 for none
    name: str | None = None  # of the result files instead of baseline_comparison or ..._MODEL
    batch: int = 25  # sequences read at once: what several processes share out


def compare(options: CompareOptions) -> None:
    """Print and write the comparison of Part 4 on one model."""
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.stories)
    items_source = options.find(options.items, preset.multiple_choice)
    chosen = {"all": default_methods, "seven": seven_methods, "choices": multiple_choice_methods}
    chosen["coding"] = lambda controllers: coding_methods()
    methods = chosen[options.methods](options.controllers or preset.data_dir / "controllers")
    with one_first():
        texts = load_stories(texts_source, preset.test_split)
        found = load_multiple_choice(items_source, preset.test_split) if options.count else Part()
        model, tokenizer = load_model(source, quiet=not is_main_process())
    if options.balance:
        use_key_balance(model, load_balance(options.balance, model))
    if options.methods == "coding" and key_balance_of(model.config) is None:
        raise ValueError(f"model {source} has no file of balanced keys: python main.py calibrate-keys makes one")
    ids = take_sequences(tokenizer, texts, options.length, options.max_rows)
    check_context(model, options.length)
    items = sample_items(found, min(options.count, len(found)), options.seed) if found else []
    sequences = torch.tensor(ids, device=model.device)
    with biased_keys(model, options.key_bias) if options.key_bias else nullcontext():
        result = compare_methods(
            model, tokenizer, sequences, items, methods, options.length // 2, options.rounds, options.batch
        )
    if not is_main_process():
        return
    shown = [
        "method",
        "peak_bytes",
        "held_bytes",
        "code_bits",
        "kl",
        "accuracy",
        "accuracy_change",
        "acc",
        "latency_ms",
    ]
    print(result.table[[c for c in shown if c in result.table]].round(4).to_string(index=False))
    print(standard_pairs(result).round(5).to_string(index=False))
    name = options.name or "baseline_comparison" + (f"_{model_name(source)}" if options.model else "")
    about = {"model": relative_to_root(source), "texts": relative_to_root(texts_source), "rows": len(ids)}
    about |= {"length": options.length, "first": options.length // 2, "key_bias": options.key_bias}
    about |= {"split": texts.split, "items": relative_to_root(items_source), "item_count": len(items)}
    about |= {"items_split": found.split, "items_schema": found.schema, "seed": options.seed}
    save_comparison(result, Path(options.out or preset.data_dir), name, about | {"processes": process_count()})


@dataclass(frozen=True)
class FactsOptions(Sources):
    """What `facts` hides, and how what was read is stored."""

    lengths: tuple[int, ...] = (2048, 4096, 7168)  # tokens of a text
    counts: tuple[int, ...] = (12, 8, 6)  # texts of each length
    facts: int = 4  # of each text
    bits: tuple[int, ...] = (4, 2)  # fixed widths; full precision always comes first
    policy: tuple[PolicyName, ...] = ("settle",)  # of the preset's controllers
    controllers: str | None = None  # folder of controllers instead of the preset's


def facts(options: FactsOptions) -> None:
    """Print and write how many facts of long texts are found, by length, depth and method."""
    if len(options.lengths) != len(options.counts):
        raise ValueError(f"counts must be one for each of {len(options.lengths)} lengths, got {len(options.counts)}")
    preset = options.get_preset()
    source, texts_source = options.model or preset.model, options.find(options.texts, preset.stories)
    methods = chosen_methods(options.bits, options.policy, options.controllers or preset.data_dir / "controllers")
    model, tokenizer = load_model(source)
    filler = load_stories(texts_source, preset.test_split)
    texts = [
        (length, text)
        for length, count in zip(options.lengths, options.counts)
        for text in fact_texts(tokenizer, filler, length, count, options.facts, options.seed)
    ]
    table = fact_table(model, texts, [FullPrecision(), *methods])
    print(fact_summary(table).round(3).to_string(index=False))
    about = {"model": relative_to_root(source), "texts": relative_to_root(texts_source), "split": filler.split}
    write_table(options.out or preset.data_dir / "facts.csv", table, about | {"seed": options.seed})


@dataclass(frozen=True)
class ChatOptions(Sources):
    """What `chat` measures."""

    answer_tokens: int = 40  # of each answer at most
    bits: tuple[int, ...] = (4,)  # fixed widths; full precision always comes first
    policy: tuple[PolicyName, ...] = ("rule", "settle")  # of the preset's controllers
    controllers: str | None = None  # folder of controllers instead of the preset's


def chat(options: ChatOptions) -> None:
    """Print a conversation of ten turns on one cache, and write what each turn costs."""
    preset = options.get_preset()
    source = options.model or preset.model
    methods = chosen_methods(options.bits, options.policy, options.controllers or preset.data_dir / "controllers")
    model, tokenizer = load_model(source)
    if not tokenizer.chat_template:
        raise ValueError(f"model {source} has no chat template: choose one that was trained to talk")
    turns = write_conversation(model, tokenizer, answer_tokens=options.answer_tokens)
    for number, turn in enumerate(turns, 1):
        print(f"{number:2}  {turn.answer!r}")
    table = chat_table(model, turns, methods)
    sums = {"read": "sum", "tokens": "max", "seconds": "sum", "held_bytes": "max", "kl": "mean"}
    print(table.groupby("method", sort=False).agg(sums).round(4).to_string())
    about = {"model": relative_to_root(source), "answer_tokens": options.answer_tokens}
    write_table(options.out or preset.data_dir / "chat.csv", table, about)


@dataclass(frozen=True)
class MemoryOptions:
    """What `memory` measures."""

    shapes: tuple[str, ...] = (EMBEDDED, "SmolLM-135M")
    lengths: tuple[int, ...] = (256, 512, 1024, 4096, 16384)  # tokens of the prompt
    batch: int = 4  # rows of the one batch that is measured too; 1 for none
    batch_length: int = 512  # tokens of its prompt
    stock_limit: int = STOCK_LIMIT  # tokens beyond which the library's quantized caches, which are slow, are left out
    seed: int = 0
    out: str | None = None  # result file instead of data/memory.csv


def memory(options: MemoryOptions) -> None:
    """Print and write peak, held and live bytes of every kind of cache, driven by random keys and values."""
    cases = [(shape, tokens, 1) for shape in options.shapes for tokens in options.lengths]
    if options.batch > 1:
        cases += [(shape, options.batch_length, options.batch) for shape in options.shapes]
    groups = memory_methods()
    table = memory_table(cases, groups, options.stock_limit, options.seed)
    shown = ["shape", "tokens", "batch", "method", "peak_share", "held_share", "live_share"]
    print("shares of what full precision holds at the end")
    print(table[shown].round(3).to_string(index=False))
    print(memory_targets_text(check_memory_targets(table)))
    about = {"seed": options.seed, "decoded": DECODED, "stock_limit": options.stock_limit, "numbers": "float32"}
    write_table(options.out or ROOT / "data" / "memory.csv", table, about)
