"""`python main.py harness`: tasks of the Language Model Evaluation Harness through committed packed caches."""

import importlib.util
from dataclasses import dataclass

from helpers.evaluation.methods import FullPrecision, PolicyName, chosen_methods
from helpers.io import relative_to_root, write_table
from helpers.models import load_model
from helpers.models.sources import Sources
from helpers.models.text_files import texts_folder


@dataclass(frozen=True)
class HarnessOptions(Sources):
    """What the harness asks, and how what was read is stored."""

    tasks: tuple[str, ...] = ("hellaswag",)  # over files with --texts-dir, else by the harness's names, from the hub
    bits: tuple[int, ...] = ()  # fixed widths; full precision always comes first
    policy: tuple[PolicyName, ...] = ()  # of the preset's controllers
    controllers: str | None = None  # folder of controllers instead of the preset's
    limit: int | None = None  # items of each task; over files they are drawn at random
    batch: int = 1  # prompts that are written at once
    max_length: int | None = None  # tokens of the longest text, by default the model's context


def harness(options: HarnessOptions) -> None:
    """Print and write the scores of tasks under full precision, fixed widths and policies."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("the Language Model Evaluation Harness is not installed: pip install -e .[harness]")
    from helpers.evaluation.harness.local_tasks import local_task
    from helpers.evaluation.harness.measuring import harness_table

    preset = options.get_preset()
    controllers = options.controllers or preset.data_dir / "controllers"
    methods = [FullPrecision(), *chosen_methods(options.bits, options.policy, controllers)]
    folder = texts_folder(options.texts_dir)
    if folder is None:
        tasks = _hub_tasks(options.tasks)
    else:
        made = [local_task(name, folder, options.limit, options.seed) for name in options.tasks]
        tasks = {task.config.task: task for task in made}
    source = options.model or preset.model
    model, tokenizer = load_model(source)
    table = harness_table(model, tokenizer, tasks, methods, options.batch, options.max_length, options.limit)
    print(table.round(4).to_string(index=False))
    about = {"model": relative_to_root(source), "texts": "files" if folder else "hub", "seed": options.seed}
    about |= {"limit": options.limit, "max_length": options.max_length}
    for task, rows in table.groupby("task", sort=False):
        write_table(options.out or preset.data_dir / f"harness_{task}.csv", rows, about)


def _hub_tasks(names: tuple[str, ...]) -> dict:
    from lm_eval.tasks import TaskManager, get_task_dict

    return get_task_dict(list(names), TaskManager())
