"""Presets: the models and texts of one setting under one name, and where its results go.

`embedded` needs no network; the others name models and data sets of the hub.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.io import ROOT, results_root
from helpers.models.text_files import in_folder

TEXTS = ("multiple_choice", "stories", "articles", "calibration")  # fields of `Preset` that name texts


@dataclass(frozen=True)
class Preset:
    """Models and texts of one setting; every source is a hub name or a local path."""

    name: str
    model: str
    multiple_choice: str
    stories: str
    gate_small: str
    gate_large: str
    articles: str  # to go on from or to summarise; "name:configuration" for a hub data set that has several
    calibration: str  # texts to find the gate's threshold on
    train_split: str = "train"  # of the multiple-choice items: what controllers learn from
    test_split: str = "validation"  # what everything is measured on
    prompt: str = "{article}"

    @property
    def data_dir(self) -> Path:
        """Where results go: `data/` for the default preset, whose results are tracked, else `data/<preset>/`."""
        return results_root() / "data" / ("" if self.name == DEFAULT_PRESET else self.name)

    @property
    def figures_dir(self) -> Path:
        """Where figures go, by the same rule."""
        return results_root() / "figures" / ("" if self.name == DEFAULT_PRESET else self.name)


DEFAULT_PRESET = "embedded"
HUB_TEXTS = {
    "multiple_choice": "Rowan/hellaswag",
    "stories": "roneneldan/TinyStories",
    "articles": "abisee/cnn_dailymail:3.0.0",
    "calibration": "Salesforce/wikitext:wikitext-2-raw-v1",
    "prompt": "Summarize the following article in a few sentences.\n\n{article}\n\nSummary:",
}
PRESETS = {
    "embedded": Preset(
        "embedded",
        model=str(ROOT / "data/models/large"),
        multiple_choice=str(ROOT / "data/samples/stories.jsonl"),
        stories=str(ROOT / "data/samples/stories.jsonl"),
        gate_small=str(ROOT / "data/models/small"),
        gate_large=str(ROOT / "data/models/large"),
        articles=str(ROOT / "data/samples/openings.jsonl"),
        calibration=str(ROOT / "data/samples/openings.jsonl"),
        test_split="test",
    ),
    "smollm": Preset(
        "smollm",
        model="HuggingFaceTB/SmolLM-360M",
        gate_small="HuggingFaceTB/SmolLM-135M",
        gate_large="HuggingFaceTB/SmolLM-1.7B",
        **HUB_TEXTS,
    ),
    "llama": Preset(
        "llama",
        model="TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        gate_small="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        gate_large="meta-llama/Llama-2-7b-chat-hf",
        **HUB_TEXTS,
    ),
}


def get_preset(name: str | None = None, texts_dir: str | None = None) -> Preset:
    """The preset `name`, by default that of the environment variable PRESET, else "embedded".

    Texts of the hub lead to the folder `texts_dir`, or that of the variable TEXTS_DIR, where one is set.
    """
    name = name or os.environ.get("PRESET") or DEFAULT_PRESET
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    preset = PRESETS[name]
    return replace(preset, **{field: in_folder(getattr(preset, field), texts_dir) for field in TEXTS})


def needed_by(source: str) -> str:
    """What needs the texts `source`, in words for a message."""
    uses: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        for field in TEXTS:
            if getattr(preset, field) == source:
                uses.setdefault(field.replace("_", "-"), []).append(preset.name)
    return "; ".join(f"the {field} texts of preset {', '.join(names)}" for field, names in uses.items()) or "asked for"
