"""What a packed cache holds, as named tensors and numbers, and a cache filled from them.

Only what the tokens need is kept: spare slots are left out, and what follows from the settings is made anew. Files:
`helpers.policies.saving`.
"""

import hashlib

import numpy as np
import torch
from transformers.cache_utils import CacheLayerMixin

from helpers.cache.bucket import Bucket, Segment, Stage
from helpers.cache.codec import Codes
from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.layout import Layout
from helpers.cache.store import PackedStore
from helpers.cache.tokens import PackedTokens

Tensors = dict[str, torch.Tensor]


def settings_of(cache: PackedKVCache) -> dict[str, object]:
    """What a cache must have in common with one whose tokens it takes over, as JSON knows it."""
    coding, plan = cache.coding, cache.plan
    balance = None
    if coding.balance is not None:
        balance = hashlib.sha256(coding.balance.matrices.cpu().contiguous().numpy().tobytes()).hexdigest()
    return {
        "layers": cache.kinds,
        "quantizer": coding.quantizer,
        "block": coding.block,
        "sinks": coding.sinks,
        "centre": coding.centre,
        "rotary frequencies": list(coding.rotary.frequencies),
        "balance": balance,
        "stretch": coding.stretch,
        "bits": None if plan is None else list(plan.pair),
        "steps": [] if plan is None else [[step.after, *step.pair, *step.shares] for step in plan.steps],
        "records received attention": cache.record_received,
    }


def state_of(cache: PackedKVCache) -> tuple[dict[str, object], Tensors]:
    """Numbers (as JSON knows them) and tensors from which `restore` makes the same cache.

    Raises `ValueError` where a forward was interrupted.
    """
    cache.expect_whole()
    cache.end_forward()
    tensors: Tensors = {}
    about: dict[str, object] = {
        "committed": cache.committed,
        "held": cache.held,
        "packed": [_tail_state(layer, f"packed.{i}", tensors) for i, layer in enumerate(cache.packed)],
        "other": [_layer_state(layer, f"other.{i}", tensors) for i, layer in enumerate(cache.other_layers)],
        "stores": [_store_state(store, f"store.{i}", tensors) for i, store in enumerate(cache.stores)],
        "held errors": len(cache.held_errors),
    }
    tensors |= {f"held_errors.{i}": errors for i, errors in enumerate(cache.held_errors)}
    if cache.visible is not None:
        tensors["visible"] = cache.visible
    return about, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def restore(cache: PackedKVCache, about: dict[str, object], tensors: Tensors, device: torch.device) -> None:
    """Fill an empty cache with what `state_of` gave; where that is not whole, the cache is left empty.

    Raises `KeyError`, `TypeError`, `ValueError` or `RuntimeError` for a state that is none of such a cache.
    """
    try:
        here = {name: tensor.to(device) for name, tensor in tensors.items()}
        for i, (layer, held) in enumerate(zip(cache.packed, about["packed"], strict=True)):
            if held is None:
                continue
            layer.lazy_initialization(here[f"packed.{i}.keys"], here[f"packed.{i}.values"])
            layer.keys, layer.values = here[f"packed.{i}.keys"], here[f"packed.{i}.values"]
            layer.tail_length, layer.packed_length = layer.keys.shape[2], held["packed_length"]
            layer.received = here.get(f"packed.{i}.received")
        for i, (layer, held) in enumerate(zip(cache.other_layers, about["other"], strict=True)):
            for name, value in held.items():
                setattr(layer, name, _unfolded(value, f"other.{i}.{name}", here))
            if "dtype" in vars(layer) or isinstance(layer, CacheLayerMixin):
                known = next((x for name, x in here.items() if name.startswith(f"other.{i}.")), None)
                layer.dtype, layer.device = (None, None) if known is None else (known.dtype, device)
        for i, held in enumerate(about["stores"]):
            store = _restored_store(cache, held, f"store.{i}", here)
            cache.stores.append(store)
            cache.store_of |= {number: (store, at) for at, number in enumerate(store.layers)}
        cache.committed, cache.held = about["committed"], about["held"]
        cache.held_errors = [here[f"held_errors.{i}"] for i in range(about["held errors"])]
        cache.visible = here.get("visible")
        cache.expect_whole()
        cache.peak.note(*cache.tensors())
    except BaseException:
        cache.reset()
        raise


def _tail_state(layer, name: str, tensors: Tensors) -> dict[str, object] | None:
    if not layer.is_initialized:
        return None
    tensors[f"{name}.keys"], tensors[f"{name}.values"] = (x[:, :, : layer.tail_length] for x in layer.states())
    if layer.received is not None:
        tensors[f"{name}.received"] = layer.received
    return {"packed_length": layer.packed_length}


def _layer_state(layer: CacheLayerMixin, name: str, tensors: Tensors) -> dict[str, object]:
    """Everything in a layer of the library but its dtype and device, which its tensors know."""
    return {
        key: _folded(value, f"{name}.{key}", tensors)
        for key, value in vars(layer).items()
        if not isinstance(value, torch.dtype | torch.device)
    }


def _folded(value: object, name: str, tensors: Tensors) -> object:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": True}
    if isinstance(value, dict):
        return {"entries": {str(key): _folded(x, f"{name}.{key}", tensors) for key, x in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ValueError(f"{name} is a {type(value).__name__}, which cannot be saved")


def _unfolded(value: object, name: str, tensors: Tensors) -> object:
    if isinstance(value, dict) and "entries" in value:
        return {int(key): _unfolded(x, f"{name}.{key}", tensors) for key, x in value["entries"].items()}
    return tensors[name] if isinstance(value, dict) else value


def _store_state(store: PackedStore, name: str, tensors: Tensors) -> dict[str, object]:
    centre, buckets = store.key.centre, []
    for number, (stage, bucket) in enumerate(store.layout.buckets.items()):
        segments = []
        for at, segment in enumerate(bucket.segments):
            used = segment.used().named()
            tensors |= {f"{name}.{number}.{at}.{field}": tensor for field, tensor in used.items()}
            segments.append({"fill": segment.fill.tolist(), "ragged": bool(segment.ragged)})
        kind = [stage.key_bits, stage.value_bits, stage.pending]
        buckets.append({"stage": kind, "blocks": bucket.blocks, "segments": segments})
    if centre is not None:
        tensors[f"{name}.mean"] = centre.mean
    sinks = None if store.sinks is None else store.sinks.tolist()
    return {"layers": store.layers, "buckets": buckets, "sinks": sinks}


def _restored_store(cache: PackedKVCache, held: dict[str, object], name: str, tensors: Tensors) -> PackedStore:
    layers = list(held["layers"])
    first = cache.packed[layers[0]]
    store = PackedStore(layers, first.keys, first.values, cache.coding, cache.max_length, cache.peak.note)
    store.sinks = None if held["sinks"] is None else np.array(held["sinks"], dtype=bool)
    if store.key.centre is not None:
        store.key.centre.mean = tensors[f"{name}.mean"]
        store.reserve(first.get_seq_length())
    layout = Layout()
    for number, bucket in enumerate(held["buckets"]):
        stage = Stage(*bucket["stage"])
        segments = []
        for at, segment in enumerate(bucket["segments"]):
            prefix = f"{name}.{number}.{at}."
            fields = {key.removeprefix(prefix): x for key, x in tensors.items() if key.startswith(prefix)}
            key = Codes(stage.key_bits, fields["key_codes"], fields.get("key_scales"))
            value = Codes(stage.value_bits, fields["value_codes"], fields.get("value_scales"))
            tokens = PackedTokens(key, value, fields["token"], fields["block_start"], fields.get("received"))
            segments.append(Segment(tokens, np.array(segment["fill"], dtype=np.int64), segment["ragged"]))
        blocks = [tuple(block) for block in bucket["blocks"]]
        layout.buckets[stage] = Bucket(stage, store.reserved, segments, blocks)
    store.layouts = [layout] * len(layers)
    return store
