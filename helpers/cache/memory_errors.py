"""What to say when a device has no more room: how much the caches hold, and what can be lowered."""

from contextlib import contextmanager

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from helpers.cache.accounting import stored_bytes
from helpers.cache.kv_cache import PackedKVCache


@contextmanager
def explain_out_of_memory(reading: str, *held: tuple[PreTrainedModel, Cache]):
    """Raise `torch.OutOfMemoryError` anew, saying what the caches hold and what to lower.

    `reading` says what was going on; `held` are the models at work, each with its cache.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):  # explained inside; out here the purpose is known
            error = error.__cause__
        parts = []
        for model, cache in held:
            weights = sum(p.nbytes for p in model.parameters())
            stored, weights = (f"{size:,} bytes ({size / 2**20:.1f} MiB)" for size in (stored_bytes(cache), weights))
            name, tokens = model.config.model_type, cache.get_seq_length()
            parts.append(f"the cache of {name} holds {stored} for {tokens:,} tokens a row beside {weights} of weights")
        packed = all(isinstance(cache, PackedKVCache) for _, cache in held)
        lower = "the cache's bits or its policy's, " if packed else ""
        advice = f"{lower}max_new_tokens, the length of the prompt, or the number of rows in the batch"
        other = "" if packed else ", or store keys and values at 4 bits with PackedKVCache(model.config, bits=4)"
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise torch.OutOfMemoryError(
            f"out of memory while {reading}: {'; '.join(parts)}. Lower {advice}{other}. ({first_line})"
        ) from error
