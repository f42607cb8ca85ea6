"""In which order tokens enter the store and leave it: their places, the slots of each width, and text order again."""

from collections.abc import Iterator

import numpy as np
import torch

from helpers.cache.codec import Codec, Codes

NONE = 0  # the width of a token that is not there


def places(states: torch.Tensor, first: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`token` and `block_start` of `PackedTokens` for states `[L, B, H, n, D]` at the positions from `first` on."""
    layers, rows, heads, n = states.shape[:4]
    index = torch.arange(n, device=states.device)
    token = (index % block).to(torch.uint8).expand(layers, rows, heads, n)
    return token, (first + index // block * block).to(torch.int32).expand(1, rows, 1, n)


def by_width(widths: np.ndarray, device: torch.device) -> Iterator[tuple[int, np.ndarray, torch.Tensor, torch.Tensor]]:
    """For each width in `widths` `[B, n]`: how many tokens of each row have it, their slots, and which slots are real.

    Slots `[1, B, 1, most]` are in text order; rows with fewer tokens than the longest are filled up. Tokens
    of width `NONE` are passed over.
    """
    for bits in np.unique(widths[widths != NONE]).tolist():
        chosen = widths == bits
        counts = chosen.sum(-1)
        most = int(counts.max())
        # Stable order by "not chosen" lists each row's chosen tokens first, in text order.
        order = np.argsort(~chosen, axis=-1, kind="stable")[:, :most]
        slots = torch.as_tensor(order, device=device)[None, :, None]
        yield bits, counts, slots, torch.as_tensor(np.arange(most) < counts[:, None], device=device)[None, :, None]


def in_text_order(
    codec: Codec,
    parts: list[Codes],
    places: list[torch.Tensor],
    starts: list[torch.Tensor],
    layer: int,
    length: int,
) -> torch.Tensor:
    """Decoded `parts` of one layer with each vector at its place `[B, H, n]`; place `length` is thrown away.

    `starts` `[B, 1, n]` are where the blocks of the parts' tokens begin.
    """
    result = None
    for codes, at, start in zip(parts, places, starts, strict=True):
        x = codec.decode(codes, start, layer)
        if result is None:
            result = x.new_zeros(*x.shape[:2], length + 1, x.shape[-1])
            codec.note(result)
        result.scatter_(2, at[..., None].expand_as(x), x)
    return result[:, :, :length]
