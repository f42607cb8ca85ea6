"""The packed key/value cache: quantization, storage, accounting of bytes, and attention that reads it.

A token's key goes from `PackedKVCache.update` (`kv_cache`, `layer`) into the full-precision tail, and when its block is
committed through `PackedStore.commit` (`store`) and `Codec.encode` (`codec`, `quantization`) into a `Bucket` (`bucket`,
`tokens`). Which widths tokens get is no matter of this package: see `helpers.policies`.
"""

from helpers.cache.accounting import code_bits, live_bytes, stored_bytes
from helpers.cache.attention.dispatch import implementation_name, use_packed_attention
from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.memory_errors import explain_out_of_memory
from helpers.cache.plan import Demotion, Plan, Step
from helpers.cache.quantization import WIDTHS, Widths, dequantize, quantize, rotation_matrix

__all__ = [
    "WIDTHS",
    "Demotion",
    "PackedKVCache",
    "Plan",
    "Step",
    "Widths",
    "code_bits",
    "dequantize",
    "explain_out_of_memory",
    "implementation_name",
    "live_bytes",
    "quantize",
    "rotation_matrix",
    "stored_bytes",
    "use_packed_attention",
]
