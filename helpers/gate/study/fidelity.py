"""What a signal is worth: how close gated text comes to the large model's (fidelity), against random calls as often.

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
from transformers import PreTrainedTokenizerBase

from helpers.gate.correction import correct_by_bisection
from helpers.gate.gate import EntropyGate
from helpers.gate.learned import signal_of_pair
from helpers.gate.pairs import Pair, load_pair
from helpers.gate.study.evaluation import evaluate_texts
from helpers.gate.study.sweep import gains_over_random, threshold_on_gated_text
from helpers.io import relative_to_root, write_table
from helpers.models import Preset, load_multiple_choice, sample_texts

COLUMNS = ["story", "words", "method", "tokens", "usage", "rougeL", "fidelity", "shared_prefix"]
MEASURES = ("fidelity", "shared_prefix", "rougeL")
REST = 20  # words that a story must have beyond a cut


@dataclass(frozen=True)
class FidelitySettings:
    """Which prompts and which gates."""

    # names of signals; "rollback" is entropy with a rollback
    signals: tuple[str, ...] = ("entropy", "max_prob", "margin", "rollback", "learned", "oracle")
    usages: tuple[float, ...] = (0.1, 0.2, 0.3)  # shares of the tokens that the large model is to write
    at: float = 0.2  # the usage at which signals are compared
    cuts: tuple[int, ...] = (30, 60, 90)  # words after which stories are cut
    random_seeds: int = 5  # seeds of the random control
    rollback: float = 6.0  # surprisal in bits above which the signal "rollback" takes tokens back
    stories: int = 57  # stories of each split at most
    max_new_tokens: int = 50  # tokens written on each prompt
    seed: int = 0  # of the choice of stories

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
    pair: Pair, prompts: list[str], settings: FidelitySettings, controllers: str | Path = "", **generation
) -> dict[str, EntropyGate]:
    """Gates of every signal at every usage, tuned on `prompts`, by the name "signal usage"; random ones by seed too.

    A learned signal is that of the pair in the folder `controllers`.
    """
    gates, tokens = {}, settings.max_new_tokens
    for usage in settings.usages:
        for name in settings.signals:
            rollback = settings.rollback if name == "rollback" else None
            signal = signal_of_pair("entropy" if rollback else name, controllers, *pair[:2])
            gate = threshold_on_gated_text(pair, prompts, signal, usage, tokens, passes=1, **generation)
            if not gate.signal.needs_large:
                gate = EntropyGate(gate.threshold, signal, rollback)
                gate = correct_by_bisection(*pair, prompts, gate, usage, tokens, rounds=3, **generation)
            gates[f"{name} {usage:g}"] = gate
        for seed in range(settings.random_seeds if usage == settings.at else 1):
            gates[f"random {usage:g} seed {seed}"] = EntropyGate(1 - usage, "random", seed=seed)
    return gates


def measure_fidelity(
    pair: Pair,
    folds: tuple[list[str], list[str]],
    settings: FidelitySettings,
    controllers: str | Path = "",
    large_tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Callable[[int], object] = lambda done: None,
) -> tuple[pd.DataFrame, list[dict[str, EntropyGate]]]:
    """One row a prompt and method (`COLUMNS`, and `fold`), and the gates of each fold.

    The stories of each of the two `folds` are written by gates that were tuned on the other. `progress` is called
    with their number after every gate; the learned signal, if it is compared, is in the folder `controllers`.
    """
    cut = [cut_stories(stories, settings.cuts) for stories in folds]
    middle = sorted(settings.cuts)[len(settings.cuts) // 2]
    tables, fold_gates = [], []
    for fold, own in enumerate(cut):
        other = cut[1 - fold]
        tuning = other.loc[other["words"] == middle, "prompt"].tolist() or other["prompt"].tolist()
        gates = fidelity_gates(pair, tuning, settings, controllers, large_tokenizer=large_tokenizer)
        texts = own["prompt"].tolist(), own["rest"].tolist()
        table = evaluate_texts(pair, *texts, gates, settings.max_new_tokens, large_tokenizer, progress)
        table = table.join(own[["story", "words"]], on="prompt")
        table["story"] += fold * len(folds[0])
        tables.append(table[COLUMNS].assign(fold=fold))
        fold_gates.append(gates)
    return pd.concat(tables, ignore_index=True), fold_gates


def summarise_fidelity(table: pd.DataFrame, gates: dict[str, EntropyGate], at: float = 0.2) -> pd.DataFrame:
    """One row a measure and signal: its `gain` over random at usage `at` and the like, see `gains_over_random`.

    Paired over prompts, with whole stories resampled.
    """
    prompts = table.assign(prompt=table["story"] * 1000 + table["words"])
    stories = prompts.groupby("prompt")["story"].first().to_numpy()
    found = {of: gains_over_random(prompts, gates, of, at, groups=stories) for of in MEASURES}
    return pd.concat(found, names=["of"]).drop(columns=["area", "area_low", "area_high"])


def report_fidelity(
    preset: Preset, settings: FidelitySettings, out: str | Path | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure on a preset's pair and stories, print the gains, and write them with every row and their origin."""
    parts = [load_multiple_choice(preset.multiple_choice, of) for of in (preset.test_split, preset.train_split)]
    folds = [sample_texts(items, min(settings.stories, len(items)), settings.seed) for items in parts]
    pair, large_tokenizer = load_pair(preset)
    prompts = sum(len(cut_stories(stories, settings.cuts)) for stories in folds)
    with tqdm(desc="texts") as bar:
        table, gates = measure_fidelity(
            pair, folds, settings, preset.data_dir / "controllers", large_tokenizer, bar.update
        )
    summary = summarise_fidelity(table, gates[0], settings.at)
    means = table.groupby("method", sort=False)[["usage", "fidelity", "shared_prefix", "rougeL"]].mean()
    print(means.round(4).to_string())
    print(f"\nOver a random gate at {settings.at:.0%} usage, {prompts} prompts of {sum(map(len, folds))} stories:")
    print(summary.round(4).to_string())
    names = {"small": preset.gate_small, "large": preset.gate_large, "texts": preset.multiple_choice}
    thresholds = [{name: gate.threshold for name, gate in fold.items()} for fold in gates]
    about = {"preset": preset.name} | {key: relative_to_root(source) for key, source in names.items()}
    out = Path(out or preset.data_dir / "gate_fidelity.csv")
    about["splits"] = [part.split for part in parts]
    write_table(out, table, about | asdict(settings) | {"thresholds": thresholds}, float_format="%.4g")
    write_table(out.with_name(f"{out.stem}_gains.csv"), summary.reset_index(), float_format="%.4g")
    return table, summary
