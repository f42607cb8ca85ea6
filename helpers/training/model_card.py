"""The card of the embedded pair: what `training.json` says of each model, and what can be measured again.

`python main.py card [--holdout-text REAL_STORIES]` measures and writes. The card's text is in `cards/pair.md`.
"""

import json
import statistics
from pathlib import Path

import torch

from helpers.evaluation import bootstrap_mean, score_items
from helpers.io import provenance, write_filled, write_json
from helpers.models import MultipleChoice, load_model, read_stories, split_holdout
from helpers.policies import CachedModel, decode
from helpers.training.pretraining import bits_per_byte

CARD = Path(__file__).parent / "cards" / "pair.md"
PAIR = ("large", "small")
SAMPLE_SEEDS = range(10)
SAMPLE_TOKENS = 120
TEMPERATURE = 0.8
STEPS = 8  # that are timed at a time


def time_per_token(models: list, tokens: int = 64, rounds: int = 15) -> list[float]:
    """Median milliseconds of a decode step at about `tokens` tokens of context, the models taking turns."""
    times: list[list[float]] = [[] for _ in models]
    for round_ in range(rounds + 2):
        for model, into in zip(models, times, strict=True):
            ids = torch.zeros(1, tokens + STEPS, dtype=torch.long, device=model.device)
            steps = decode(CachedModel(model), ids, forced=True).latency_ms[tokens:]
            if round_ >= 2:
                into += steps
    return [statistics.median(each) for each in times]


def sample_stories(model, tokenizer) -> list[str]:
    """One text for each seed, from the beginning-of-text token, unpicked."""
    start = torch.tensor([[tokenizer.bos_token_id]], device=model.device)
    texts = []
    for seed in SAMPLE_SEEDS:
        cached = CachedModel(model)
        ids = decode(cached, start, max_new_tokens=SAMPLE_TOKENS, temperature=TEMPERATURE, seed=seed).token_ids
        texts.append(tokenizer.decode(ids[0], skip_special_tokens=True).strip())
    return texts


def measure_pair(folder: Path, items: list[MultipleChoice], holdout_text: str | None) -> dict[str, object]:
    """Everything on the card that can be measured: accuracy, time, samples and, given the text, bits per byte."""
    loaded = {name: load_model(folder / name, quiet=True) for name in PAIR}
    held_out = split_holdout(read_stories(holdout_text))[1] if holdout_text else []
    scores = {name: score_items(*loaded[name], items) for name in PAIR}
    scores["large_minus_small"] = scores["large"] - scores["small"]
    result = {name: {measure: bootstrap_mean(each[measure]) for measure in each} for name, each in scores.items()}
    if held_out:
        for name in PAIR:
            result[name]["bits_per_byte"] = bits_per_byte(*loaded[name], held_out)
    times = time_per_token([loaded[name][0] for name in PAIR])
    return result | {
        "ms_per_token": dict(zip(PAIR, times, strict=True)),
        "time_ratio": times[1] / times[0],
        "samples": sample_stories(*loaded["large"]),
        "items": len(items),
        "provenance": provenance(),
    }


def write_pair_card(folder: Path, measured: dict[str, object]) -> None:
    """Write `folder/README.md` and `folder/measured.json`."""
    columns = {}
    for name in PAIR:
        told = json.loads((folder / name / "training.json").read_text(encoding="utf-8"))
        columns[name] = told | {
            "millions": told["parameters"] / 1e6,
            "millions_seen": told["tokens_seen"] / 1e6,
            "train_tokens_millions": told["train_tokens"] / 1e6,
            "minutes": told["seconds"] / 60,
            "ms_per_token": measured["ms_per_token"][name],
            **{each: "{:.1%} [{:.1%}, {:.1%}]".format(*measured[name][each]) for each in ("acc", "acc_norm")},
        }
    shown = (" ".join(text.split()) for text in measured["samples"])
    gain = {name: [100 * x for x in interval] for name, interval in measured["large_minus_small"].items()}
    write_filled(
        folder / "README.md",
        CARD,
        **columns,
        samples="\n\n".join(f"**Seed {seed}.** {text}" for seed, text in zip(SAMPLE_SEEDS, shown, strict=True)),
        gain={name: "{:+.1f} [{:+.1f}, {:+.1f}]".format(*interval) for name, interval in gain.items()},
        time_ratio=measured["time_ratio"],
        items=measured["items"],
        temperature=TEMPERATURE,
        sample_tokens=SAMPLE_TOKENS,
    )
    write_json(folder / "measured.json", measured)
