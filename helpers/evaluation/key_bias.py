"""Keys with large constant channels, as models with a bias on their key projection have them (Qwen2): a harder test.

Such a constant turns with position like the rest of the key. Plain 4-bit caches answer nonsense on it (transformers
issue 35185).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from helpers.cache.arguments import head_dim
from helpers.cache.rotary import rotary_of


@contextmanager
def biased_keys(model: PreTrainedModel, size: float) -> Iterator[PreTrainedModel]:
    """While this lasts `size` is added to one number of every key, and subtracted from another: those of the pair that
    rotary embedding turns most slowly, before it turns them.

    Raises `ValueError` for models without rotary embedding or without projections named `k_proj`.
    """
    config = model.config.get_text_config(decoder=True)
    dim = head_dim(config)
    pairs = rotary_of(config, dim).pairs
    projections = [module for name, module in model.named_modules() if name.endswith("k_proj")]
    if not pairs or not projections:
        raise ValueError(f"{type(model).__name__} has no keys that rotary embedding turns and a k_proj makes")
    bias = torch.zeros(dim)
    bias[pairs - 1], bias[2 * pairs - 1] = size, -size

    def add(module: nn.Module, inputs: tuple, keys: torch.Tensor) -> torch.Tensor:
        return keys + bias.to(keys).repeat(keys.shape[-1] // dim)

    hooks = [projection.register_forward_hook(add) for projection in projections]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()
