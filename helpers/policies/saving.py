"""Files of texts that were read: a packed cache and what its driver knows, so that a long prompt is paid once.

    save_cache(cached, "prompt.safetensors")
    load_cache(CachedModel(model, PackedKVCache(model.config, bits=4)), "prompt.safetensors")

One safetensors file: tensors, and in its header what they mean, as JSON. It names the model by its fingerprint and the
cache by its settings, and carries a checksum: a file of another model, of other settings, or one that was damaged is
refused, and the cache then is empty and of use.
"""

import hashlib
import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from helpers.cache import PackedKVCache, restore, settings_of, state_of
from helpers.io import atomic_path, relative_to_root
from helpers.models import fingerprint
from helpers.policies.cached_model import CachedModel
from helpers.policies.driver import PolicyDriver
from helpers.policies.features import TokenFeatures

FORMAT = 1  # of the files


def save_cache(cached: CachedModel, path: str | Path) -> Path:
    """Write what `cached` has read, with what its driver knows, to `path`.

    Random policies begin their draws anew after `load_cache`. Raises `ValueError` for a cache that is not packed.
    """
    _expect_packed(cached)
    about, tensors = state_of(cached.cache)
    driver = None if cached.driver is None else _driver_state(cached.driver, tensors)
    content = {
        "format": FORMAT,
        "model": fingerprint(cached.model),
        "settings": _settings(cached),
        "cache": about,
        "driver": driver,
        "sha256": _checksum(tensors),
    }
    with atomic_path(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={"about": json.dumps(content)})
    return Path(path)


def load_cache(cached: CachedModel, path: str | Path) -> None:
    """Go on where `save_cache` stood: `cached`, which forgets what it has read, takes over the text in the file.

    Its model, the settings of its cache, and its policy must be those of the file. Raises `FileNotFoundError` where
    there is none and `ValueError` for one that does not fit or is damaged; `cached` is then empty.
    """
    _expect_packed(cached)
    path, shown = Path(path), relative_to_root(path)
    cached.reset()
    if not path.is_file():
        raise FileNotFoundError(f"{shown} does not exist: save_cache writes such a file")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
        number, model, checksum = about["format"], about["model"], about["sha256"]
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{shown} is no file of a saved cache ({error})") from error
    if number != FORMAT:
        raise ValueError(f"{shown} has format {number}, and this version reads format {FORMAT}")
    if model != fingerprint(cached.model):
        raise ValueError(f"{shown} was saved from another model, or in another dtype")
    for name, expected in _settings(cached).items():
        if (found := about["settings"].get(name)) != expected:
            raise ValueError(f"{shown}: {name} must be {expected!r} as in this cache, and the file has {found!r}")
    if checksum != _checksum(tensors):
        raise ValueError(f"{shown} is damaged: its tensors are not those that were written")
    try:
        restore(cached.cache, about["cache"], tensors, cached.model.device)
        if cached.driver is not None:
            _restore_driver(cached.driver, about["driver"], tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        cached.reset()
        raise ValueError(f"{shown} is no file of such a cache ({error})") from error


def _expect_packed(cached: CachedModel) -> None:
    if not isinstance(cached.cache, PackedKVCache):
        raise ValueError(f"only a PackedKVCache can be saved and loaded, got {type(cached.cache).__name__}")


def _settings(cached: CachedModel) -> dict[str, object]:
    policy = None if cached.driver is None else cached.driver.policy.name
    return json.loads(json.dumps({**settings_of(cached.cache), "policy": policy}))


def _checksum(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _driver_state(driver: PolicyDriver, tensors: dict[str, torch.Tensor]) -> dict[str, object]:
    """Add what a driver knows to `tensors`; returns what is no tensor."""
    known = {
        "text": driver.text,
        "token_ids": driver.token_ids,
        "last_log_p": driver.last_log_p,
        "chosen": torch.cat([x.cpu() for x in driver.chosen], dim=1) if driver.chosen else None,
        "committed_ids": torch.cat(driver.committed_ids, dim=1) if driver.committed_ids else None,
        **{f"features.{field.name}": getattr(driver.features, field.name) for field in fields(TokenFeatures)},
    }
    tensors |= {f"driver.{name}": x.detach().cpu().contiguous() for name, x in known.items() if x is not None}
    return {"counts": driver.row_counts is not None}


def _restore_driver(driver: PolicyDriver, about: dict[str, object], tensors: dict[str, torch.Tensor]) -> None:
    device = driver.model.device
    here = {name.removeprefix("driver."): x.to(device) for name, x in tensors.items() if name.startswith("driver.")}
    driver.restore(here, about["counts"])
