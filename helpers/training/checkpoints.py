"""Checkpoints and logs of a training run that may be interrupted."""

import csv
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.io.atomic import atomic_path, recover
from helpers.io.paths import relative_to_root


def save_checkpoint(folder: Path, model, optimizers, step: int, fingerprint: dict) -> None:
    with atomic_path(folder, directory=True) as temporary:
        save_file({k: v.contiguous() for k, v in model.named_parameters()}, temporary / "weights.safetensors")
        state = {}
        for number, optimizer in enumerate(optimizers):
            for index, entries in optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    state[f"{number}.{index}.{name}"] = torch.as_tensor(value).contiguous()
        save_file(state, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps({"step": step, **fingerprint}), encoding="utf-8")


def load_checkpoint(folder: Path, model, optimizers, fingerprint: dict) -> int:
    """Restore weights and optimizer state; return the step to go on with (0 without a checkpoint)."""
    recover(folder)
    if not (folder / "state.json").is_file():
        return 0
    saved = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    step = saved.pop("step")
    if saved != fingerprint:
        changed = sorted(k for k in fingerprint if saved.get(k) != fingerprint[k])
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


def read_log(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_log(path: Path, rows: list[dict[str, str]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["step", "loss", "seconds"])
        writer.writeheader()
        writer.writerows(rows)
