"""Checkpoints of a training run that may be interrupted: weights, optimizer state, step, and what run it is.

A checkpoint is taken up only by a run of the same settings and texts.
"""

import json
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from helpers.io import relative_to_root
from helpers.io.atomic import atomic_path, recover


def save_checkpoint(folder: Path, model, optimizers, step: int, run: dict) -> None:
    """Write a checkpoint as a whole; `run` is what tells this training run from others."""
    with atomic_path(folder, directory=True) as temporary:
        save_file({k: v.contiguous() for k, v in model.named_parameters()}, temporary / "weights.safetensors")
        state = {}
        for number, optimizer in enumerate(optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    state[f"{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
        save_file(state, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **run}), encoding="utf-8")


def load_checkpoint(folder: Path, model, optimizers, run: dict) -> int:
    """Restore weights and optimizer state; return the step to go on with (0 without a checkpoint)."""
    recover(folder)
    if not (folder / "state.json").is_file():
        return 0
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    step = saved.pop("step")
    if saved != run:
        changed = sorted(k for k in run if saved.get(k) != run[k])
        raise ValueError(
            f"checkpoint {relative_to_root(folder)} was written with other {', '.join(changed)}; "
            "train with the same, or remove the checkpoint to start anew"
        )
    weights = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    state = load_file(folder / "optimizer.safetensors")
    for number, optimizer in enumerate(optimizers):
        content = optimizer.state_dict()
        content["state"] = {}
        for key, value in state.items():
            owner, index, name = key.split(".", 2)
            if int(owner) == number:
                content["state"].setdefault(int(index), {})[name] = value
        optimizer.load_state_dict(content)
    return step


def read_log(path: Path, last_step: int) -> list[dict[str, str]]:
    """Lines of the training log up to `last_step`, `step`, `loss` and `seconds` as written; none without a file."""
    lines = pd.read_csv(path, dtype=str).to_dict("records") if path.is_file() else []
    return [line for line in lines if int(line["step"]) <= last_step]
