"""What tells one model from another, so that results kept in a file are not taken for another model's."""

import hashlib
import json

from transformers import PreTrainedModel


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's configuration, dtype and a sample of every weight: other weights, other hash."""
    config = model.config.to_diff_dict()
    config = {name: x for name, x in config.items() if name != "transformers_version" and not name.startswith("_")}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()
