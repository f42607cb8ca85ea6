"""The packed key/value cache: quantization, storage, accounting of bytes, and attention that reads it.

A token's key enters the full-precision tail in `PackedKVCache.update` (`kv_cache`, `layer`). Once its block is complete
it is committed: by the next forward, by a driver, or, while a prompt is read, when the next layer begins (`prompt`).
`PackedStore.commit` (`store`) has it coded by `Codec.encode` (`codec`, `quantization`) and puts it into a `Segment` of
a `Bucket` (`bucket`, `tokens`). Attention gets the layer's `PackedStates` (`layer`) and reads the codes where they lie
(`attention.dispatch`; `attention.reference` is the definition). Which widths tokens get: see `helpers.policies`.

Shapes: L layers that are stored together, B rows of the batch, H key/value heads, n tokens or slots, D head_dim.
"""

from helpers.cache.accounting import code_bits, live_bytes, stored_bytes
from helpers.cache.attention.dispatch import implementation_name, use_packed_attention
from helpers.cache.balance import Balance, key_balance_of, use_key_balance
from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.memory_errors import explain_out_of_memory
from helpers.cache.plan import Demotion, Plan, Step
from helpers.cache.quantization import WIDTHS, Widths, dequantize, quantize, rotation_matrix
from helpers.cache.saving import restore, settings_of, state_of

__all__ = [
    "WIDTHS",
    "Balance",
    "Demotion",
    "PackedKVCache",
    "Plan",
    "Step",
    "Widths",
    "code_bits",
    "dequantize",
    "explain_out_of_memory",
    "implementation_name",
    "key_balance_of",
    "live_bytes",
    "quantize",
    "restore",
    "rotation_matrix",
    "settings_of",
    "state_of",
    "stored_bytes",
    "use_key_balance",
    "use_packed_attention",
]
