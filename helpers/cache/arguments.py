"""What the cache refuses: settings out of range, and widths that do not fit the tokens; models: see `kinds`."""

import numpy as np
from transformers import PreTrainedConfig

from helpers.cache.balance import Balance
from helpers.cache.codec import CENTRES, QUANTIZERS
from helpers.cache.kinds import packed_layers
from helpers.cache.quantization import Widths, check_width, width_pair
from helpers.cache.tokens import EMPTY

MOST_SINKS = 8  # fewer than the tokens that are there when the first are committed


def check_settings(
    block: int,
    quantizer: str,
    max_length: int | None,
    sinks: int,
    centre: str,
    balance: Balance | None,
    config: PreTrainedConfig,
) -> None:
    """Raise `ValueError` for settings of `PackedKVCache` that are out of range."""
    if not isinstance(block, int) or not 1 <= block < EMPTY:
        raise ValueError(f"block must lie between 1 and {EMPTY - 1} tokens, got {block!r}")
    if quantizer not in QUANTIZERS:
        raise ValueError(f"quantizer must be one of {QUANTIZERS}, got {quantizer!r}")
    if max_length is not None and (not isinstance(max_length, int) or max_length < 1):
        raise ValueError(f"max_length must be a number of tokens, 1 or more, got {max_length!r}")
    if not isinstance(sinks, int) or not 0 <= sinks <= MOST_SINKS:
        raise ValueError(f"sinks must be a number of tokens from 0 to {MOST_SINKS}, got {sinks!r}")
    if centre not in CENTRES:
        raise ValueError(f"centre must be one of {CENTRES}, got {centre!r}")
    if not isinstance(balance, Balance | None):
        raise ValueError(f"balance must be a Balance, 'model' or None, got {balance!r}")
    if balance is not None:
        layer = config.per_layer_config[packed_layers(config)[0]]
        heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
        expected = [len(packed_layers(config)), heads, head_dim(config), head_dim(config)]
        if quantizer == "minmax":
            raise ValueError("balance turns keys, which quantizer 'minmax' stores as they are: use 'rotated'")
        if list(balance.matrices.shape) != expected:
            raise ValueError(
                f"balance must be of this model, {expected} (packed layers, key/value heads, head_dim, head_dim), got "
                f"{list(balance.matrices.shape)}"
            )


def head_dim(config: PreTrainedConfig) -> int:
    """Numbers in a key of one head of the packed layers; some configurations leave it to be computed."""
    layer = config.per_layer_config[packed_layers(config)[0]]
    return getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads


def check_settling(
    source: Widths, blocks: int, waiting: int, block: int, keep: int, scored: bool, pending: bool
) -> None:
    """Raise `ValueError` for what `settle` cannot do: `waiting` blocks of `block` tokens are at `source` bits."""
    if not 1 <= blocks <= waiting:
        raise ValueError(
            f"blocks must lie between 1 and the number of pending blocks at {source} bits ({waiting}), got {blocks}"
        )
    if not 0 <= keep <= block:
        raise ValueError(f"keep must lie between 0 and block ({block}), got {keep}")
    if keep and pending:
        raise ValueError("keep settles a block for good: it cannot be combined with pending")
    if keep and not scored:
        raise ValueError(f"keep={keep} needs scores to choose by")


def token_widths(
    bits: Widths | np.ndarray, rows: int, tokens: int | None, pending: bool
) -> tuple[tuple[int, int] | np.ndarray, int | None]:
    """One pair (key bits, value bits) or, where tokens differ, the array `[rows, tokens]`; and how many tokens.

    Raises `ValueError` for other widths than 2, 4, 8, 16, for another shape, and for pending tokens that differ.
    """
    if not isinstance(bits, np.ndarray):
        return width_pair(bits), tokens
    if bits.ndim != 2 or bits.shape[0] != rows:
        raise ValueError(f"bits must have shape [{rows}, tokens], one row a sequence; got {list(bits.shape)}")
    if tokens not in (None, bits.shape[1]):
        raise ValueError(f"bits holds {bits.shape[1]} tokens a row, but tokens is {tokens}")
    used = [check_width(width) for width in np.unique(bits).tolist()]
    if pending and len(used) > 1:
        raise ValueError(f"pending tokens must share one width, got {used}")
    return (used[0], used[0]) if len(used) == 1 else bits.astype(np.int64), bits.shape[1]
