"""What tells one model from another."""

import hashlib
import json

from transformers import PreTrainedModel


def model_fingerprint(model: PreTrainedModel) -> list:
    """What tells one model from another: its configuration, its dtype and the size of its weights."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name != "transformers_version"}
    weight = sum(p.double().abs().sum().item() for p in model.parameters())
    return [json.dumps(config, default=str), str(model.dtype), f"{weight:.6g}"]


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration, dtype and a sample of every weight: other weights, other hash."""
    config = model.config.to_diff_dict()
    config = {name: value for name, value in config.items() if not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
