"""Files of balanced keys: the linear maps of one model (`helpers.cache.balance`), as safetensors.

Written by `python main.py calibrate-keys`, beside the weights of a model that is a folder and else beside the results
of its preset. There `load_model` finds it.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from helpers.cache import Balance
from helpers.io import ROOT, atomic_path, provenance, relative_to_root
from helpers.models.fingerprint import weights_fingerprint
from helpers.models.presets import PRESETS

KEY_BALANCE = "key_balance.safetensors"


def balance_path(source: str | Path) -> Path | None:
    """Where the balance of the model `source` lies; None for one that is neither a folder nor a preset's."""
    if Path(source).is_dir():
        return Path(source) / KEY_BALANCE
    return next((ROOT / "data" / x.name / KEY_BALANCE for x in PRESETS.values() if x.model == str(source)), None)


def find_balance(source: str | Path, model: PreTrainedModel) -> Balance | None:
    """The balance of the model `source`, None where there is none or where weights lie on disk and cannot be compared.

    Raises `ValueError` for a file of another model.
    """
    path = balance_path(source)
    if path is None or not path.is_file() or any(weight.is_meta for weight in model.parameters()):
        return None
    return load_balance(path, model)


def save_balance(balance: Balance, path: str | Path, model: PreTrainedModel, about: dict[str, object]) -> Path:
    """Write a model's balance to `path` with its fingerprint, `about` and provenance. Float16: half the bytes, and
    what the rounding changes is the same for queries and keys."""
    content = {"model": weights_fingerprint(model), **about, **provenance()}
    tensors = {"balance": balance.matrices.to(torch.float16).cpu().contiguous()}
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(content)})
    return Path(path)


def load_balance(path: str | Path, model: PreTrainedModel) -> Balance:
    """The balance in a file; raises `FileNotFoundError` for no file, `ValueError` for one that is none of `model`'s."""
    path, shown = Path(path), relative_to_root(path)
    if not path.is_file():
        raise FileNotFoundError(f"{shown} does not exist: python main.py calibrate-keys writes such a file")
    try:
        with safe_open(path, "pt") as file:
            about, matrices = json.loads((file.metadata() or {})["about"]), file.get_tensor("balance").float()
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{shown} is no file of balanced keys ({error})") from error
    if matrices.ndim != 4 or matrices.shape[2] != matrices.shape[3] or not matrices.isfinite().all():
        raise ValueError(f"{shown}: balance must be finite matrices [layers, heads, D, D], got {list(matrices.shape)}")
    spread = torch.linalg.svdvals(matrices)
    if (spread[..., -1] < 1e-4 * spread[..., 0]).any():
        raise ValueError(f"{shown}: balance must be matrices that can be inverted")
    if about.get("model") != weights_fingerprint(model):
        raise ValueError(f"{shown} was made for another model: python main.py calibrate-keys makes one for this")
    return Balance(matrices)
