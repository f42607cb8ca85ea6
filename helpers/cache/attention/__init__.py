"""Attention that reads the packed cache.

`dispatch` offers it to transformers and chooses the implementation: `reference` defines it in plain PyTorch,
`numba_cpu` and `triton_cuda` compute the same faster. `variance` and `received` are what is recorded of its weights.
"""

from helpers.cache.attention.dispatch import implementation_name, use_packed_attention

__all__ = ["implementation_name", "use_packed_attention"]
