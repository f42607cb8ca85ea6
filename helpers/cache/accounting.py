"""What caches take up, and what to say when a device has no more room.

`stored_bytes` counts caches of any kind by their tensors. `explain_out_of_memory` turns the device's error, which
speaks of one allocation, into one that says how much the caches hold and what can be lowered.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

from helpers.cache.kv_cache import PackedKVCache


def stored_bytes(cache: Cache) -> int:
    """Bytes of all tensors that a cache of any kind holds."""
    if isinstance(cache, PackedKVCache):
        return cache.stored_bytes()
    tensors = {id(t): t for layer in cache.layers for value in vars(layer).values() for t in _tensors(value)}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def live_bytes(cache: Cache) -> int:
    """`stored_bytes` less spare capacity, which only the packed cache has."""
    return cache.live_bytes() if isinstance(cache, PackedKVCache) else stored_bytes(cache)


def _tensors(value: object) -> Iterator[torch.Tensor]:
    """The plain tensors inside tensors of special kinds, tuples, lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        if hasattr(value, "__tensor_flatten__"):
            for name in value.__tensor_flatten__()[0]:
                yield from _tensors(getattr(value, name))
        else:
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


@contextmanager
def explain_out_of_memory(reading: str, *held: tuple[PreTrainedModel, Cache]):
    """Raise `torch.OutOfMemoryError` anew, saying what the caches hold and what to lower.

    `reading` says what was going on; `held` are the models at work, each with its cache.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if isinstance(
            error.__cause__, torch.OutOfMemoryError
        ):  # explained inside: out here more is known of the purpose
            error = error.__cause__
        parts = []
        for model, cache in held:
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            tokens = cache.get_seq_length()
            parts.append(
                f"the cache of {model.config.model_type} holds {_mib(stored_bytes(cache))} for {tokens:,} tokens a row "
                f"beside {_mib(weights)} of weights"
            )
        packed = all(isinstance(cache, PackedKVCache) for _, cache in held)
        lower = "the cache's bits or its policy's, " if packed else ""
        advice = f"{lower}max_new_tokens, the length of the prompt, or the number of rows in the batch"
        other = "" if packed else ", or store keys and values at 4 bits with PackedKVCache(model.config, bits=4)"
        raise torch.OutOfMemoryError(
            f"out of memory while {reading}: {'; '.join(parts)}. Lower {advice}{other}. ({_first_line(error)})"
        ) from error


def _mib(size: int) -> str:
    return f"{size:,} bytes ({size / 2**20:.1f} MiB)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def code_bits(cache: Cache) -> float:
    """Average width of the stored codes, full-precision tokens counted at 16; NaN where the cache does not tell."""
    if isinstance(cache, PackedKVCache):
        return cache.code_bits()
    return 16.0 if isinstance(cache, DynamicCache) and not isinstance(cache, QuantizedCache) else float("nan")
