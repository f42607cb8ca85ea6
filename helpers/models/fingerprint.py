"""What tells a model from others: by it, results that are kept in a file are not taken for another model's."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

from helpers.cache import key_balance_of


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration, dtype, a sample of every weight, and of the maps that balance its keys."""
    balance = key_balance_of(model.config)
    digest = _digest(model, torch.float32)
    digest.update(str([str(weight.dtype) for weight in model.parameters()]).encode())
    if balance is not None:
        digest.update(balance.matrices.cpu().numpy().tobytes())
    return digest.hexdigest()


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration and of a sample of every weight, the same in float32 and in bfloat16."""
    return _digest(model, torch.bfloat16).hexdigest()


def _digest(model: PreTrainedModel, precision: torch.dtype) -> "hashlib._Hash":
    config = model.config.to_diff_dict()
    left_out = {"transformers_version", "dtype"}
    config = {name: x for name, x in config.items() if name not in left_out and not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].to(precision).float().cpu().numpy()
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest
