"""What a signal is worth: how close gated text comes to the large model's own, against random calls as often.

    python main.py gate-fidelity

Every story is cut after several numbers of words, which gives more prompts than stories; intervals resample whole
stories. Thresholds for the stories of one split are found on the other split, so that no prompt is judged by a
threshold that was tuned on it, and all stories count. The random control is averaged over several seeds.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from helpers.gate.correction import correct_by_bisection
from helpers.gate.gate import EntropyGate
from helpers.gate.prompts import check_same_tokens
from helpers.gate.study.evaluation import GATED, evaluate_gate
from helpers.gate.study.sweep import gains_over_random, threshold_on_gated_text
from helpers.gate.text import LARGE, SMALL
from helpers.io.atomic import atomic_path
from helpers.io.paths import relative_to_root
from helpers.io.provenance import provenance
from helpers.io.results import write_json
from helpers.models.items import load_multiple_choice, sample_texts
from helpers.models.loading import load_model
from helpers.models.presets import Preset

COLUMNS = ["story", "words", "method", "tokens", "usage", "rougeL", "fidelity", "shared_prefix"]


MEASURES = ("fidelity", "shared_prefix", "rougeL")


REST = 20  # words that a story must have beyond a cut


@dataclass(frozen=True)
class FidelitySettings:
    """Which prompts and which gates: `cuts` in words, `rollback` in bits, at most `stories` of each split."""

    signals: tuple[str, ...] = ("entropy", "max_prob", "margin", "rollback", "oracle")
    usages: tuple[float, ...] = (0.1, 0.2, 0.3)
    at: float = 0.2
    cuts: tuple[int, ...] = (30, 60, 90)
    random_seeds: int = 5
    rollback: float = 6.0
    stories: int = 57
    max_new_tokens: int = 50
    seed: int = 0

    def __post_init__(self):
        if self.at not in self.usages:
            raise ValueError(f"at must be one of the usages {self.usages}, got {self.at}")
        for name in ("random_seeds", "stories", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def cut_stories(stories: list[str], cuts: tuple[int, ...]) -> pd.DataFrame:
    """One row a prompt: `story` (index), `words`, `prompt`, `rest`. Stories too short for a cut give no row for it."""
    rows = []
    for i, story in enumerate(stories):
        words = story.split()
        for cut in cuts:
            if len(words) >= cut + REST:
                rows.append({"story": i, "words": cut, "prompt": " ".join(words[:cut]), "rest": " ".join(words[cut:])})
    if not rows:
        raise ValueError(f"cuts {cuts}: none of the {len(stories)} stories is {min(cuts) + REST} words long")
    return pd.DataFrame(rows)


def fidelity_gates(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    settings: FidelitySettings,
    **generation,
) -> dict[str, EntropyGate]:
    """Gates of every signal at every usage, tuned on `prompts`, by the name "signal usage"; random ones by seed too."""
    gates = {}
    tokens = settings.max_new_tokens
    for usage in settings.usages:
        for signal in settings.signals:
            name, rollback = f"{signal} {usage:g}", None
            if signal == "rollback":
                signal, rollback = "entropy", settings.rollback
            gate = threshold_on_gated_text(
                small, large, tokenizer, prompts, signal, usage, tokens, passes=1, **generation
            )
            if signal != "oracle":
                gate = EntropyGate(gate.threshold, signal, rollback)
                gate = correct_by_bisection(
                    small, large, tokenizer, prompts, gate, usage, tokens, rounds=3, **generation
                )
            gates[name] = gate
        for seed in range(settings.random_seeds if usage == settings.at else 1):
            gates[f"random {usage:g} seed {seed}"] = EntropyGate(1 - usage, "random", seed=seed)
    return gates


def measure_fidelity(
    small: PreTrainedModel,
    large: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folds: tuple[list[str], list[str]],
    settings: FidelitySettings,
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[pd.DataFrame, list[dict[str, EntropyGate]]]:
    """One row a prompt and method (`COLUMNS`, and `fold`), and the gates of each fold.

    The stories of each of the two `folds` are written by gates that were tuned on the other. `progress` is called
    with 1 after every prompt.
    """
    cut = [cut_stories(stories, settings.cuts) for stories in folds]
    middle = sorted(settings.cuts)[len(settings.cuts) // 2]
    generation = {"large_tokenizer": large_tokenizer}
    tables, fold_gates = [], []
    for fold, own in enumerate(cut):
        other = cut[1 - fold]
        tuning = other.loc[other["words"] == middle, "prompt"].tolist() or other["prompt"].tolist()
        gates = fidelity_gates(small, large, tokenizer, tuning, settings, **generation)
        table = evaluate_gate(
            small, large, tokenizer, own["prompt"].tolist(), own["rest"].tolist(), gates, settings.max_new_tokens,
            methods=(GATED, LARGE, SMALL), on_prompt=lambda rows: progress(1), **generation,
        )  # fmt: skip
        table = table.join(own[["story", "words"]], on="prompt")
        table["story"] += fold * len(folds[0])
        tables.append(table[COLUMNS].assign(fold=fold))
        fold_gates.append(gates)
    return pd.concat(tables, ignore_index=True), fold_gates


def summarise_fidelity(table: pd.DataFrame, gates: dict[str, EntropyGate], at: float = 0.2) -> pd.DataFrame:
    """One row a measure and signal: its `gain` over random at usage `at` and mean `gain` between the usages.

    As `gate_sweep.gains_over_random`, paired over prompts, with whole stories resampled.
    """
    prompts = table.assign(prompt=table["story"] * 1000 + table["words"])
    stories = prompts.groupby("prompt")["story"].first().to_numpy()
    found = {of: gains_over_random(prompts, gates, of, at, groups=stories) for of in MEASURES}
    return pd.concat(found, names=["of"]).drop(columns=["area", "area_low", "area_high"])


def report_fidelity(
    preset: Preset, settings: FidelitySettings, out: str | Path | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure on a preset's pair and stories, print the gains, and write them with every row and their origin."""
    small, tokenizer = load_model(preset.gate_small)
    large, large_tokenizer = load_model(preset.gate_large)
    check_same_tokens(tokenizer, large_tokenizer)
    folds = []
    for split in (preset.test_split, preset.train_split):
        items = load_multiple_choice(preset.multiple_choice, split)
        folds.append(sample_texts(items, min(settings.stories, len(items)), settings.seed))
    prompts = sum(len(cut_stories(stories, settings.cuts)) for stories in folds)
    with tqdm(total=prompts) as bar:
        table, gates = measure_fidelity(small, large, tokenizer, tuple(folds), settings, large_tokenizer, bar.update)
    summary = summarise_fidelity(table, gates[0], settings.at)
    means = table.groupby("method", sort=False)[["usage", "fidelity", "shared_prefix", "rougeL"]].mean()
    print(means.round(4).to_string())
    print(f"\nOver a random gate at {settings.at:.0%} usage, {prompts} prompts of {sum(map(len, folds))} stories:")
    print(summary.round(4).to_string())
    out = Path(out or preset.data_dir / "gate_fidelity.csv")
    for path, content in ((out, table), (out.with_name(f"{out.stem}_gains.csv"), summary.reset_index())):
        with atomic_path(path) as temporary:
            content.to_csv(temporary, index=False, float_format="%.4g")
    names = {"small": preset.gate_small, "large": preset.gate_large, "texts": preset.multiple_choice}
    thresholds = [{name: gate.threshold for name, gate in fold.items()} for fold in gates]
    about = {"preset": preset.name} | {key: relative_to_root(source) for key, source in names.items()}
    write_json(out.with_suffix(".json"), about | asdict(settings) | {"thresholds": thresholds} | provenance())
    return table, summary
