"""The report of `python main.py`: calibrate a gate, compare it on prompts, print what was found.

Lines, order and definitions down to the comparative block are those of the project's first report; what it did not
have comes after.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.correction import correct_by_bisection
from helpers.gate.gate import EntropyGate, OnlineTracker, check_usage
from helpers.gate.learned import signal_of_pair
from helpers.gate.prompts import check_same_tokens, fit_prompts, sample_articles
from helpers.gate.signals import Signal
from helpers.gate.study.evaluation import ASSISTED, GATED, METHODS, NAIVE, evaluate_gate
from helpers.gate.study.summaries import paired_intervals, speed_against_ideal, summarise_methods
from helpers.gate.text import LARGE, SMALL
from helpers.io import ROOT, relative_to_root, write_table
from helpers.models import Preset, load_articles, load_model, load_paragraphs, placement, use_onednn_linear

LINE, RULE = "=" * 57, "-" * 57
HELD_OUT_PROMPTS = 50  # at most; usage varies so much from prompt to prompt that fewer miss by several points
THRESHOLDS = ROOT / "data" / ".calibration"  # found before
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class ReportSettings:
    """What is compared, on which prompts, and how the gate's threshold is found."""

    small: str | None = None  # folder or hub name instead of the preset's small model
    large: str | None = None  # folder or hub name instead of the preset's large model
    articles: str | None = None  # file or hub name instead of the preset's prompts
    calibration: str | None = None  # file or hub name instead of the preset's calibration texts
    percentile: float = 50  # of the signal on the calibration texts
    calibration_texts: int = 100  # number of calibration texts
    prompts: int = 5  # number of prompts
    max_new_tokens: int = 50  # tokens written on each prompt
    signal: str = "entropy"  # entropy, max_prob, margin, learned, or random (the control)
    rollback: float | None = None  # bits: take back tokens that surprise the large model more
    # share (0.2) or percent (20) of tokens instead of the percentile, corrected to it
    target_usage: float | None = None
    correct: Literal["bisection", "online"] = "bisection"  # on other prompts, or while writing
    repeats: int = 1  # runs of each prompt, of which the median time counts
    max_prompt_tokens: int = 1024  # articles are cut to this
    fixed_length: bool = False  # write on after the end of a text
    recalibrate: bool = False  # do not use thresholds found before
    seed: int = 0  # of the choice of texts and prompts

    def __post_init__(self):
        if not 0 <= self.percentile <= 100:
            raise ValueError(f"percentile must lie between 0 and 100, got {self.percentile}")
        if self.target_usage is not None:
            check_usage(share_of(self.target_usage))


def share_of(usage: float) -> float:
    """A usage that is given as a share of tokens, or above 1 in percent, as a share."""
    return usage / 100 if usage > 1 else usage


def report_gate(preset: Preset, settings: ReportSettings | None = None, out: str | Path | None = None) -> pd.DataFrame:
    """Print the whole report and return the table behind it (also written to `out`, a CSV, if given)."""
    settings = settings or ReportSettings()
    names = settings.small or preset.gate_small, settings.large or preset.gate_large
    if not all(names):
        raise ValueError(f"{preset.without_pair}; or give --small and --large")
    articles, calibration = settings.articles or preset.articles, settings.calibration or preset.calibration
    same = Path(articles).resolve() == Path(calibration).resolve()  # else a file that was named need not be cut
    found, paragraphs = load_articles(articles, cut=same), load_paragraphs(calibration, cut=same)
    chosen, others = sample_articles(found, settings.prompts, settings.seed, HELD_OUT_PROMPTS)
    (small, tokenizer), (large, large_tokenizer) = readers = load_gate_pair(*names)
    usage = None if settings.target_usage is None else share_of(settings.target_usage)
    percentile = settings.percentile if usage is None else 100 * (1 - usage)
    print(f"\n--- Calibrating entropy threshold from '{relative_to_root(calibration)}' ---")
    signal = signal_of_pair(settings.signal, preset.data_dir / "controllers", small, large)
    gate = _calibrate(small, tokenizer, paragraphs, percentile, signal, settings)
    limits = preset.prompt, readers, settings.max_new_tokens, settings.max_prompt_tokens
    texts, cut = fit_prompts(chosen, *limits)
    generation = {"large_tokenizer": large_tokenizer, "stop_at_end": not settings.fixed_length}
    if usage is not None and settings.correct == "online":
        gate = OnlineTracker.follow(gate, usage)
    elif usage is not None:
        held_out, _ = fit_prompts(others, *limits)
        gate = correct_by_bisection(
            small, large, tokenizer, held_out, gate, usage, settings.max_new_tokens, **generation
        )
        print(f"Corrected on {len(held_out)} other prompts for a usage of {usage:.0%}: {gate.threshold:.4f}")
    print(f"\n\n{LINE}\n====== Evaluating Gated Generation on Test Prompts ======\n{LINE}")

    def show(rows: pd.DataFrame) -> None:
        seconds, rouge = (rows.set_index("method")[column] for column in ("seconds", "rougeL"))
        print(f"\n--- Processing Prompt {rows['prompt'].iloc[0] + 1}/{settings.prompts} ---")
        times = (("Gated", GATED), ("Large Model", LARGE), ("Small Model", SMALL))
        print(" | ".join(f"{name} Time: {seconds[method]:.2f}s" for name, method in times))
        scores = (("Gated", GATED), ("Large", LARGE), ("Small", SMALL))
        print(" | ".join(f"{name} ROUGE-L: {rouge[method]:.4f}" for name, method in scores))

    same_width = small.config.vocab_size == large.config.vocab_size
    table = evaluate_gate(
        (small, large, tokenizer), texts, [article.highlights for article in chosen], gate, settings.max_new_tokens,
        methods=[method for method in METHODS if same_width or method != ASSISTED], repeats=settings.repeats,
        on_prompt=show, **generation,
    )  # fmt: skip
    _print_aggregate(table, *(Path(name).name for name in names))
    _print_more(table, settings.signal, usage)
    if cut:
        print(f"  - Prompts cut to fit: {cut} of {settings.prompts}")
    if out:
        about = {"preset": preset.name} | dict(zip(("small", "large"), map(relative_to_root, names), strict=True))
        about |= {"articles": relative_to_root(articles), "articles_split": found.split}
        about |= {"calibration": relative_to_root(calibration), "calibration_split": paragraphs.split}
        about |= {"signal": settings.signal, "percentile": percentile, "threshold": gate.threshold}
        write_table(out, table, about | {"seed": settings.seed, "speed": speed_against_ideal(table)})
    return table


def load_gate_pair(small: str, large: str) -> tuple[Loaded, Loaded]:
    """The small and the large model, each with its tokenizer; a large one that does not fit is spread."""
    print(f"Loading models... This may take a moment, especially for the {Path(large).name} model.")
    pair = load_model(small, quiet=True), load_model(large, quiet=True, device_map="fit")
    check_same_tokens(pair[0][1], pair[1][1])
    for model, _ in pair:
        use_onednn_linear(model)
    print("Models loaded successfully.")
    print(f"Small model ({relative_to_root(small)}) is on: {pair[0][0].device}")
    print(f"Large model ({relative_to_root(large)}) device map: {placement(pair[1][0])}")
    return pair


def _calibrate(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    paragraphs: list[str],
    percentile: float,
    signal: Signal,
    settings: ReportSettings,
) -> EntropyGate:
    """Calibrate on a random sample of the texts, or on all where there are fewer than are asked for."""
    print(f"Target percentile: {percentile:g}% (will trigger large model on the top {100 - percentile:g}% of tokens)")
    print("Processing dataset samples to gather entropy distribution...", flush=True)
    texts = settings.calibration_texts
    chosen = random.Random(settings.seed).sample(paragraphs, min(texts, len(paragraphs)))
    cache_dir = None if settings.recalibrate else THRESHOLDS
    gate = EntropyGate.calibrate(
        small, tokenizer, chosen, percentile, signal, rollback=settings.rollback, cache_dir=cache_dir
    )
    print(f"Calibration complete. Calculated Threshold at {percentile:g}th percentile: {gate.threshold:.4f}")
    if len(chosen) < texts:
        print(f"({len(chosen)} texts: all that there are)")
    return gate


def _print_aggregate(table: pd.DataFrame, small: str, large: str) -> None:
    """The aggregate and the comparative block, named after the two models."""
    mean = summarise_methods(table)
    seconds = mean["seconds"]

    def print_mean(method: str) -> None:
        print(f"  - Average Time: {seconds[method]:.2f}s")
        print(f"  - Average ROUGE-L Score: {mean['rougeL'][method]:.4f}")

    print(f"\n\n{LINE}\n============== AGGREGATE PERFORMANCE METRICS ==============\n{LINE}")
    print(f"Gated Method ({small} + {large}):")
    print_mean(GATED)
    print(f"  - Average Large Model Usage: {table[table['method'] == GATED]['usage'].mean():.2%}\n{RULE}")
    for name, method in ((large, LARGE), (small, SMALL)):
        print(f"Baseline: {name} Only (Optimized with KV Cache):")
        print_mean(method)
        print(RULE)
    print("COMPARATIVE METRICS:")
    print(f"  - Speedup vs. FAIR Baseline ({large} Opt.): {seconds[LARGE] / seconds[GATED]:.2f}x")
    print(f"  - Speedup vs. NAIVE Baseline ({large} no-KV): {seconds[NAIVE] / seconds[GATED]:.2f}x")
    print(LINE)


def _print_more(table: pd.DataFrame, signal: str, target: float | None) -> None:
    """What the first report did not have: time per token, all ROUGE, fidelity, intervals, the ideal speed-up."""
    summary, speed = summarise_methods(table), speed_against_ideal(table)
    shown = summary.assign(first_token_ms=1000 * summary.pop("first_token_seconds")).drop(columns="seconds")
    print(
        "\nPER METHOD (means over prompts; ROUGE: F-measure, stemmed; fidelity: ROUGE-L to the large model's own text):"
    )
    print(shown.rename_axis(None).to_string(float_format=lambda value: f"{value:.4g}"))
    aimed = "none" if target is None else f"{target:.0%}"
    print(f"\nSIGNAL: {signal}; usage target: {aimed}; usage: {speed['usage']:.1%}")
    print(f"\nPER TOKEN, with 95% paired bootstrap intervals over {table['prompt'].nunique()} prompts:")
    for name, (value, low, high) in paired_intervals(table).items():
        unit = "x" if name.startswith("speedup") else ""
        print(f"  - {name}: {value:.3f}{unit} [{low:.3f}, {high:.3f}]")
    print(f"  - Cost ratio c (small / large, time per token): {speed['cost_ratio']:.3f}")
    print(f"  - Ideal speed-up 1 / (c + usage): {speed['ideal']:.2f}x, reached: {speed['share']:.0%}")
