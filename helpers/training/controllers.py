"""All controllers of a model in one go, `python main.py train`, and the card that lies beside them."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from helpers.io import write_filled
from helpers.policies import SCHEDULES, AgeSchedule
from helpers.training.commit import commit_tasks, save_commit, train_commit
from helpers.training.costs import load_or_measure_costs
from helpers.training.fitting import History
from helpers.training.settle import SETTLE_LABEL, settle_examples, train_settle

CARD = Path(__file__).parent / "cards" / "controllers.md"


def train_controllers(
    model: PreTrainedModel,
    table: pd.DataFrame,
    sequences: Sequence[Sequence[int]],
    folder: str | Path,
    model_name: str,
    seed: int = 0,
    schedules: Sequence[AgeSchedule] = tuple(AgeSchedule(*schedule) for schedule in SCHEDULES),
) -> pd.DataFrame:
    """Train and save the three controllers of a model into `folder`; what notebook 02 does step by step.

    `table` is a result of `collect`, `sequences` are token ids of longer texts for the settle network. Returns the
    held-out loss and epoch of each.
    """
    histories: dict[str, History] = {}
    costs, multiplier = load_or_measure_costs(model, table, Path(folder) / "costs.csv")
    for name, task in commit_tasks(costs, multiplier).items():
        network, histories[name] = train_commit(costs, **task, seed=seed)
        about = {"label": task["label"], "model": model_name, "weights": vars(task["weights"])}
        save_commit(network, folder, name, costs, about)
    examples = settle_examples(model, sequences, schedules, seed=seed)
    network, histories["settle"] = train_settle(examples.inputs, examples.damage, examples.text_ids, seed=seed)
    network.save(folder, "settle", {"label": SETTLE_LABEL, "model": model_name})
    write_controller_card(folder)
    return pd.DataFrame(
        {"controller": name, "epoch": history.best, "held-out loss": history.validation[history.best]}
        for name, history in histories.items()
    )


def write_controller_card(folder: str | Path) -> None:
    """Write `README.md` beside the controllers of `folder`: what each reads, was trained on, and is for."""
    rows = []
    for path in sorted(Path(folder).glob("*.safetensors")):
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        row = {"controller": f"`{path.stem}`", "reads": ", ".join(_in_short(about["features"]))}
        row["hidden layers"] = " x ".join(map(str, about["hidden"])) or "none"
        rows.append(row | {"label": about["label"], "trained for model": about["model"]})
    write_filled(Path(folder) / "README.md", CARD, table=pd.DataFrame(rows).to_markdown(index=False))


def _in_short(features: list[str]) -> list[str]:
    """Names of features, of a vector only the first and the last."""
    vector = [name for name in features if name.startswith("hidden_")]
    return features if len(vector) < 3 else [name for name in features if name not in vector[1:-1]]
