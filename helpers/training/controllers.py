"""All controllers of a model in one go, and their card: `python main.py train`."""

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel

from helpers.io.atomic import atomic_path
from helpers.policies.schedules import SCHEDULES, AgeSchedule
from helpers.training.commit import commit_tasks, save_commit, train_commit
from helpers.training.costs import load_or_measure_costs
from helpers.training.settle import train_settle
from helpers.training.settle_examples import SETTLE_LABEL, settle_examples


def train_controllers(
    model: PreTrainedModel,
    table: pd.DataFrame,
    rows: Sequence[Sequence[int]],
    folder: str | Path,
    model_name: str,
    seed: int = 0,
    schedules: Sequence[AgeSchedule] = tuple(AgeSchedule(*schedule) for schedule in SCHEDULES),
) -> pd.DataFrame:
    """Train and save the three controllers of a model into `folder`; what notebook 02 does step by step.

    `table` is a result of `collection.collect`, `rows` are token ids of longer texts for the settle network. Returns
    the held-out loss and epoch of each.
    """
    costs, price = load_or_measure_costs(model, table, Path(folder) / "costs.csv")
    summary = []
    for name, task in commit_tasks(costs, price).items():
        network, history = train_commit(costs, **task, seed=seed)
        about = {"label": task["label"], "model": model_name, "weights": vars(task["weights"])}
        save_commit(network, folder, name, costs, about)
        summary.append({"controller": name, "epoch": history.best, "held-out loss": history.validation[history.best]})
    examples = settle_examples(model, rows, schedules, seed=seed)
    network, history = train_settle(examples.inputs, examples.damage, examples.text_ids, seed=seed)
    network.save(folder, "settle", {"label": SETTLE_LABEL, "model": model_name})
    summary.append({"controller": "settle", "epoch": history.best, "held-out loss": history.validation[history.best]})
    write_controller_card(folder)
    return pd.DataFrame(summary)


def write_controller_card(folder: str | Path) -> None:
    """Write `README.md` beside the controllers of `folder`: what each reads, was trained on, and is for."""
    lines = ["# Controllers", "", "Small networks that choose KV-cache widths; written by notebook 02.", ""]
    lines += ["| controller | reads | hidden layers | label | trained for model |", "|---|---|---|---|---|"]
    for path in sorted(Path(folder).glob("*.safetensors")):
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        hidden = " x ".join(map(str, about["hidden"])) or "none"
        lines.append(
            f"| `{path.stem}` | {', '.join(about['features'])} | {hidden} | {about['label']} | {about['model']} |"
        )
    lines += [
        "",
        "`helpers.controller.LearnedController.load(folder, name)` reads them. Each is a safetensors file with the",
        "means and scales of its inputs, and a JSON with everything else. They know one model: train your own with",
        "`python main.py train`.",
        "",
    ]
    with atomic_path(Path(folder) / "README.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
