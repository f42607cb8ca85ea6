"""Speed of gated generation at real model sizes, and where the time goes that the ideal does not have.

    python main.py gate-bench --pair SmolLM-135M+1.7B

Pairs of published shapes with random weights, or the embedded pair. Entropies of random models mean nothing, so the
gate computes them, as any gate must, and fires at random: speed does not depend on which tokens it fires at.
"""

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from helpers.evaluation import bootstrap_ratio
from helpers.gate.batch import gated_texts
from helpers.gate.gate import EntropyGate
from helpers.gate.pairs import Pair
from helpers.gate.study.evaluation import GATED, evaluate_gate
from helpers.gate.study.parts import ideal_with_prompt, time_parts
from helpers.gate.study.summaries import speed_against_ideal, summarise_methods
from helpers.gate.text import LARGE, SMALL
from helpers.io import ROOT, provenance, write_json
from helpers.models import PRESETS, choose_device, load_articles, load_model, random_model, use_onednn_linear

EMBEDDED = PRESETS["embedded"]
FOLDER = ROOT / "data" / "benchmarks"
PAIRS = {
    "embedded": (EMBEDDED.gate_small, EMBEDDED.gate_large),
    "SmolLM-135M+360M": ("SmolLM-135M", "SmolLM-360M"),
    "SmolLM-135M+1.7B": ("SmolLM-135M", "SmolLM-1.7B"),
}


@dataclass
class FixedShareGate(EntropyGate):
    """Fires at a share `usage` of the tokens whatever the signal says, and at the same ones in every run of a text."""

    threshold: float = 0.0
    usage: float = 0.2

    def fires(self, value: float) -> bool:
        # The digits of the value far behind the point are as good as drawn.
        return value * 1e4 % 1 < self.usage


@dataclass(frozen=True)
class GateBenchmark:
    """What is timed."""

    pair: str = "SmolLM-135M+360M"  # embedded, SmolLM-135M+360M or SmolLM-135M+1.7B
    usage: float = 0.2  # share of the tokens that the large model writes
    prompts: int = 5  # number of prompts
    prompt_tokens: int = 32  # tokens of each prompt
    new_tokens: int = 50  # tokens written on each prompt
    rounds: int = 3  # runs of each prompt, of which the median counts
    batches: tuple[int, ...] = (4, 8)  # numbers of prompts that are written at once
    dtype: str | None = None  # float32, float16 or bfloat16 instead of what suits the device
    seed: int = 0  # of the random weights

    def __post_init__(self):
        if self.pair not in PAIRS:
            raise ValueError(f"pair must be one of {', '.join(PAIRS)}, got {self.pair!r}")
        if not 0 < self.usage < 1:
            raise ValueError(f"usage must be a share between 0 and 1, got {self.usage}")
        for name, least in (("prompts", 1), ("prompt_tokens", 1), ("rounds", 1), ("new_tokens", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if min(self.batches, default=1) < 1:
            raise ValueError(f"batches must be numbers of prompts, 1 or more, got {self.batches}")
        if self.dtype not in (None, "float32", "float16", "bfloat16"):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {self.dtype!r}")


def load_benchmark_pair(settings: GateBenchmark) -> Pair:
    """Both models of a pair; random ones get the embedded tokenizer, whose tokens are a part of theirs."""
    device, dtype = choose_device()
    dtype = getattr(torch, settings.dtype) if settings.dtype else dtype
    small, large = PAIRS[settings.pair]
    own, tokenizer = load_model(EMBEDDED.gate_small, device, dtype, quiet=True)
    if settings.pair == "embedded":
        return own, load_model(large, device, dtype, quiet=True)[0], tokenizer
    models = (random_model(shape, settings.seed + i, device, dtype) for i, shape in enumerate((small, large)))
    return *(use_onednn_linear(model) for model in models), tokenizer


def time_gate(settings: GateBenchmark) -> dict[str, object]:
    """Time one pair: figures, parts and settings, as they are written."""
    small, large, tokenizer = pair = load_benchmark_pair(settings)
    ids = [tokenizer(each.article)["input_ids"] for each in load_articles(EMBEDDED.articles)]
    texts = [text[: settings.prompt_tokens] for text in ids if len(text) >= settings.prompt_tokens][: settings.prompts]
    if len(texts) < settings.prompts:
        raise ValueError(
            f"only {len(texts)} prompts have {settings.prompt_tokens} tokens, asked for {settings.prompts}"
        )
    prompts = [tokenizer.decode(text, skip_special_tokens=True) for text in texts]
    gate = FixedShareGate(usage=settings.usage)
    table = evaluate_gate(
        pair, prompts, prompts, gate, settings.new_tokens, methods=(GATED, LARGE, SMALL), repeats=settings.rounds,
        stop_at_end=False,
    )  # fmt: skip
    summary, speed = summarise_methods(table), speed_against_ideal(table)
    wide = table.pivot(index="prompt", columns="method", values="seconds")
    speed["speedup_low"], speed["speedup_high"] = bootstrap_ratio(wide[LARGE], wide[GATED])[1:]
    parts = time_parts(pair, prompts, gate, settings.new_tokens, settings.rounds)
    with_prompt = ideal_with_prompt(speed, parts)
    speed |= {"ideal_with_prompt": with_prompt, "share_with_prompt": speed["speedup"] / with_prompt}
    throughput = time_batches(pair, prompts, gate, settings)
    return {
        "settings": asdict(settings),
        "weights": {
            name: sum(p.numel() for p in model.parameters()) for name, model in ((SMALL, small), (LARGE, large))
        },
        "dtype": str(large.dtype).removeprefix("torch."),
        "ms_per_token": summary["ms_per_token"].to_dict(),
        "first_token_ms": (1000 * summary["first_token_seconds"]).to_dict(),
        "speed": {name: float(value) for name, value in speed.items()},
        "parts": {name: float(value) for name, value in parts.items()},
        "throughput": throughput,
    }


def time_batches(pair: Pair, prompts: list[str], gate: EntropyGate, settings: GateBenchmark) -> dict[str, float]:
    """Tokens per second with several prompts at once, over those with one at a time, by the number of prompts.

    Sizes take turns; of the `rounds` the median ratio counts. Prompts beyond the last whole batch are left out.
    """
    sizes = [size for size in settings.batches if size <= len(prompts)]
    ratios: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(settings.rounds + 1):
        for size in sizes:
            chosen = prompts[: len(prompts) // size * size]
            rates = []
            for together in (1, size):
                started = time.perf_counter()
                write = {"max_new_tokens": settings.new_tokens, "batch": together, "stop_at_end": False}
                results = gated_texts(*pair, chosen, gate, **write)
                rates.append(sum(len(result.token_ids) for result in results) / (time.perf_counter() - started))
            if turn:  # the first is for warming up
                ratios[size].append(rates[1] / rates[0])
    return {str(size): statistics.median(of_size) for size, of_size in ratios.items()}


def run_gate_benchmark(settings: GateBenchmark, out: str | Path | None = None) -> dict[str, object]:
    """Time a pair, print the figures and write them to `data/benchmarks/gate_<pair>.json` (or `out`; "-": nowhere)."""
    result = time_gate(settings) | {"provenance": provenance()}
    print(f"{settings.pair}, {result['dtype']}, {settings.prompt_tokens} + {settings.new_tokens} tokens")
    for title, key, digits in (("ms per token", "ms_per_token", 2), ("speed", "speed", 3), ("parts", "parts", 3)):
        print(f"{title}: " + ", ".join(f"{name} {value:.{digits}f}" for name, value in result[key].items()))
    for size, ratio in result["throughput"].items():
        print(f"{size} prompts at once: {ratio:.2f} times the tokens per second of one at a time")
    if out != "-":
        write_json(out or FOLDER / f"gate_{settings.pair}.json", result)
    return result
