"""The report of `python main.py`: calibrate a gate, compare it on prompts, print what was found.

Lines, order and definitions down to the comparative block are those of the project's first report; what it did not
have comes after.
"""

import random
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.calibration import calibrate
from helpers.gate.correction import correct_by_bisection
from helpers.gate.gate import EntropyGate, OnlineTracker
from helpers.gate.prompts import check_same_tokens
from helpers.gate.study.evaluation import ASSISTED, GATED, METHODS, NAIVE, evaluate_gate
from helpers.gate.study.prompts import fit_prompts, sample_articles
from helpers.gate.study.summaries import compare, speed_against_ideal, summarise_methods
from helpers.gate.text import LARGE, SMALL
from helpers.io.atomic import atomic_path
from helpers.io.paths import relative_to_root
from helpers.io.provenance import provenance
from helpers.io.results import write_json
from helpers.models.articles import load_articles, load_paragraphs
from helpers.models.loading import load_model, placement
from helpers.models.onednn_linear import use_onednn_linear
from helpers.models.presets import Preset

LINE, RULE = "=" * 57, "-" * 57


HELD_OUT_PROMPTS = 50  # at most; usage varies so much from prompt to prompt that fewer miss by several points


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def load_pair(small: str, large: str) -> tuple[Loaded, Loaded]:
    """The small and the large model, each with its tokenizer; a large one that does not fit is spread."""
    print(f"Loading models... This may take a moment, especially for the {short_name(large)} model.")
    pair = load_model(small, quiet=True), load_model(large, quiet=True, device_map="fit")
    check_same_tokens(pair[0][1], pair[1][1])
    for model, _ in pair:
        use_onednn_linear(model)
    print("Models loaded successfully.")
    print(f"Small model ({relative_to_root(small)}) is on: {pair[0][0].device}")
    print(f"Large model ({relative_to_root(large)}) device map: {placement(pair[1][0])}")
    return pair


def short_name(source: str) -> str:
    return Path(source).name


def print_calibration(
    small: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    percentile: float = 50,
    texts: int = 100,
    signal: str = "entropy",
    rollback: float | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> EntropyGate:
    """Calibrate on a random sample of the texts of `source`, or on all where it holds fewer than `texts`."""
    print(f"\n--- Calibrating entropy threshold from '{relative_to_root(source)}' ---")
    print(
        f"Target percentile: {percentile:g}% (will trigger large model on the top {100 - percentile:g}% of tokens)",
    )
    print("Processing dataset samples to gather entropy distribution...", flush=True)
    paragraphs = load_paragraphs(source)
    chosen = random.Random(seed).sample(paragraphs, min(texts, len(paragraphs)))
    gate = calibrate(small, tokenizer, chosen, percentile, signal=signal, rollback=rollback, cache_dir=cache_dir)
    print(f"Calibration complete. Calculated Threshold at {percentile:g}th percentile: {gate.threshold:.4f}")
    if len(chosen) < texts:
        print(f"({len(chosen)} texts: all that there are)")
    return gate


def print_prompt(rows: pd.DataFrame) -> None:
    """The lines of one prompt."""
    by = rows.set_index("method")
    times = " | ".join(f"{name} Time: {by['seconds'][method]:.2f}s" for name, method in _SHOWN)
    scores = " | ".join(f"{name} ROUGE-L: {by['rougeL'][method]:.4f}" for name, method in _SHOWN)
    print(times.replace("Large Time", "Large Model Time").replace("Small Time", "Small Model Time"))
    print(scores)


_SHOWN = (("Gated", GATED), ("Large", LARGE), ("Small", SMALL))


def print_aggregate(table: pd.DataFrame, small: str, large: str) -> None:
    """The aggregate and the comparative block, named after the two models."""
    mean = summarise_methods(table)
    usage = table[table["method"] == GATED]["usage"].mean()
    print(f"\n\n{LINE}\n============== AGGREGATE PERFORMANCE METRICS ==============\n{LINE}")
    print(f"Gated Method ({small} + {large}):")
    _print_mean(mean, GATED)
    print(f"  - Average Large Model Usage: {usage:.2%}\n{RULE}")
    for name, method in ((large, LARGE), (small, SMALL)):
        print(f"Baseline: {name} Only (Optimized with KV Cache):")
        _print_mean(mean, method)
        print(RULE)
    seconds = mean["seconds"]
    print("COMPARATIVE METRICS:")
    print(f"  - Speedup vs. FAIR Baseline ({large} Opt.): {seconds[LARGE] / seconds[GATED]:.2f}x")
    print(f"  - Speedup vs. NAIVE Baseline ({large} no-KV): {seconds[NAIVE] / seconds[GATED]:.2f}x")
    print(LINE)


def _print_mean(mean: pd.DataFrame, method: str) -> None:
    print(f"  - Average Time: {mean['seconds'][method]:.2f}s")
    print(f"  - Average ROUGE-L Score: {mean['rougeL'][method]:.4f}")


def print_more(table: pd.DataFrame) -> None:
    """What the first report did not have: time per token, all ROUGE, fidelity, intervals, the ideal speed-up."""
    summary, speed, against = summarise_methods(table), speed_against_ideal(table), compare(table)
    shown = summary.assign(first_token_ms=1000 * summary.pop("first_token_seconds")).drop(columns="seconds")
    print(
        "\nPER METHOD (means over prompts; ROUGE: F-measure, stemmed; fidelity: ROUGE-L to the large model's own text):"
    )
    print(shown.rename_axis(None).to_string(float_format=lambda value: f"{value:.4g}"))
    prompts = table["prompt"].nunique()
    print(f"\nPER TOKEN, with 95% paired bootstrap intervals over {prompts} prompts:")
    for name, (value, low, high) in against.items():
        unit = "x" if name.startswith("speedup") else ""
        print(f"  - {name}: {value:.3f}{unit} [{low:.3f}, {high:.3f}]")
    print(f"  - Cost ratio c (small / large, time per token): {speed['cost_ratio']:.3f}")
    print(f"  - Ideal speed-up 1 / (c + usage): {speed['ideal']:.2f}x, reached: {speed['share']:.0%}")


def report(
    preset: Preset,
    small: str | None = None,
    large: str | None = None,
    articles: str | None = None,
    calibration: str | None = None,
    percentile: float = 50,
    calibration_texts: int = 100,
    prompts: int = 5,
    max_new_tokens: int = 50,
    signal: str = "entropy",
    rollback: float | None = None,
    target_usage: float | None = None,
    correct: str = "bisection",
    repeats: int = 1,
    max_prompt_tokens: int = 1024,
    fixed_length: bool = False,
    seed: int = 0,
    cache_dir: str | Path | None = None,
    out: str | Path | None = None,
) -> pd.DataFrame:
    """Print the whole report and return the table behind it (also written to `out`, a CSV, if given).

    With `target_usage` the threshold starts from that share's percentile and is corrected to it: by "bisection" on
    prompts that are not evaluated, or "online", while the evaluated prompts are written.
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"percentile must lie between 0 and 100, got {percentile}")
    if target_usage is not None and not 0 <= target_usage <= 1:
        raise ValueError(f"target_usage must be a share between 0 and 1, got {target_usage}")
    small, large = small or preset.gate_small, large or preset.gate_large
    (small_model, tokenizer), (large_model, large_tokenizer) = load_pair(small, large)
    percentile = percentile if target_usage is None else 100 * (1 - target_usage)
    gate = print_calibration(
        small_model, tokenizer, calibration or preset.calibration, percentile, calibration_texts, signal, rollback,
        seed, cache_dir,
    )  # fmt: skip
    found = load_articles(articles or preset.articles)
    chosen, others = sample_articles(found, prompts, seed, HELD_OUT_PROMPTS)
    readers = [(small_model, tokenizer), (large_model, large_tokenizer)]
    texts, cut = fit_prompts(chosen, preset.prompt, readers, max_new_tokens, max_prompt_tokens)
    settings = {"large_tokenizer": large_tokenizer, "stop_at_end": not fixed_length}
    if target_usage is not None and correct == "online":
        gate = OnlineTracker.follow(gate, target_usage)
    elif target_usage is not None:
        held_out, _ = fit_prompts(others, preset.prompt, readers, max_new_tokens, max_prompt_tokens)
        gate = correct_by_bisection(
            small_model, large_model, tokenizer, held_out, gate, target_usage, max_new_tokens, **settings
        )
        print(f"Corrected on {len(held_out)} other prompts for a usage of {target_usage:.0%}: {gate.threshold:.4f}")
    print(f"\n\n{LINE}\n====== Evaluating Gated Generation on Test Prompts ======\n{LINE}")

    def show(rows: pd.DataFrame) -> None:
        print(f"\n--- Processing Prompt {rows['prompt'].iloc[0] + 1}/{prompts} ---")
        print_prompt(rows)

    same_width = small_model.config.vocab_size == large_model.config.vocab_size
    methods = METHODS if same_width else tuple(method for method in METHODS if method != ASSISTED)
    table = evaluate_gate(
        small_model, large_model, tokenizer, texts, [article.highlights for article in chosen], gate, max_new_tokens,
        methods=methods, repeats=repeats, on_prompt=show, **settings,
    )  # fmt: skip
    print_aggregate(table, short_name(small), short_name(large))
    print_more(table)
    if cut:
        print(f"  - Prompts cut to fit: {cut} of {prompts}")
    if out:
        with atomic_path(out) as temporary:
            table.to_csv(temporary, index=False, float_format="%.6g")
        about = {"preset": preset.name, "small": relative_to_root(small), "large": relative_to_root(large)}
        about |= {"signal": signal, "percentile": percentile, "threshold": gate.threshold, "seed": seed}
        write_json(Path(out).with_suffix(".json"), about | {"speed": speed_against_ideal(table)} | provenance())
    return table
