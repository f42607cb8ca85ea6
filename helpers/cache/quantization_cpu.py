"""The inner loops of `quantization` compiled for the CPU: each vector is read once, and nothing is made on the way.

The same numbers as with tensor operations, but for the order in which squared errors are summed: between two grids
that are equally good to the last digit, the choice may differ.
"""

import numpy as np
import torch

from helpers.cache.compiling import compilers

EXPONENT = np.int32(0x7F800000)  # bits of a float32 that are all set where it is NaN or infinite
MATH = {"reassoc", "nsz", "contract"}  # not "arcp": codes are those of a true division
_compiled, _inlined = compilers(MATH)
_exactly, _inlined_exactly = compilers({"nsz"})  # reading back multiplies, then adds, as tensor operations do


@_inlined
def _find_ends(x, patterns, n, shares, low, high):
    for v in range(len(x)):
        row, bits = x[v], patterns[v]
        least, most, unsound = row[0], row[0], np.int32(0)
        for j in range(n):
            least, most = min(least, row[j]), max(most, row[j])
            unsound += (bits[j] & EXPONENT) == EXPONENT
        if unsound:
            low[v] = high[v] = np.nan
            continue
        middle, half = (least + most) / np.float32(2), (most - least) / np.float32(2)
        best, best_half = np.float32(np.inf), half
        for share in shares:
            reach = half * share
            scale, zero = np.float32(2) * reach / np.float32(3), middle - reach
            safe = scale if scale > 0 else np.float32(1)
            error = np.float32(0)
            for j in range(n):
                code = min(max(np.rint((row[j] - zero) / safe), np.float32(0)), np.float32(3))
                change = code * scale + zero - row[j]
                error += change * change
            if error < best:
                best, best_half = error, reach
        low[v], high[v] = (middle - best_half, middle + best_half) if len(shares) else (least, most)


@_compiled
def _ends(x, patterns, shares, low, high):
    if x.shape[1] == 64:
        _find_ends(x, patterns, 64, shares, low, high)
    elif x.shape[1] == 128:
        _find_ends(x, patterns, 128, shares, low, high)
    elif x.shape[1] == 32:
        _find_ends(x, patterns, 32, shares, low, high)
    else:
        _find_ends(x, patterns, x.shape[1], shares, low, high)


@_inlined
def _write_codes(x, n, scales, bits, top, packed, stretch, limits):
    part = n * bits // 8
    for v in range(len(x)):
        row, out, scale, zero = x[v], packed[v], scales[v, 0], scales[v, 1]
        safe = scale if scale > 0 else np.float32(1)
        squares, along = np.float32(0), np.float32(0)
        for j in range(part):
            byte = np.int32(0)
            for field in range(8 // bits):
                number = row[field * part + j]
                code = min(max(np.rint((number - zero) / safe), np.float32(0)), top)
                byte |= np.int32(code) << np.int32(field * bits)
                squares += number * number
                along += number * (code * scale + zero)
            out[j] = byte
        if len(stretch):
            stretch[v] = min(max(squares / along, limits[0]), limits[1]) if along > 0 else np.float32(1)


@_inlined
def _write_any(x, n, scales, bits, packed, stretch, limits):
    if bits == 2:
        _write_codes(x, n, scales, 2, np.float32(3), packed, stretch, limits)
    elif bits == 4:
        _write_codes(x, n, scales, 4, np.float32(15), packed, stretch, limits)
    else:
        _write_codes(x, n, scales, 8, np.float32(255), packed, stretch, limits)


@_compiled
def _pack(x, scales, bits, packed, stretch, limits):
    if x.shape[1] == 64:
        _write_any(x, 64, scales, bits, packed, stretch, limits)
    elif x.shape[1] == 128:
        _write_any(x, 128, scales, bits, packed, stretch, limits)
    elif x.shape[1] == 32:
        _write_any(x, 32, scales, bits, packed, stretch, limits)
    else:
        _write_any(x, x.shape[1], scales, bits, packed, stretch, limits)


@_inlined_exactly
def _read_any(packed, n, scales, bits, x):
    for v in range(len(x)):
        row, out, scale, zero = packed[v], x[v], scales[v, 0], scales[v, 1]
        if bits == 2:
            for j in range(n // 4):
                byte = np.int32(row[j])
                out[j] = np.float32(byte & 3) * scale + zero
                out[n // 4 + j] = np.float32((byte >> 2) & 3) * scale + zero
                out[n // 2 + j] = np.float32((byte >> 4) & 3) * scale + zero
                out[3 * n // 4 + j] = np.float32(byte >> 6) * scale + zero
        elif bits == 4:
            for j in range(n // 2):
                byte = np.int32(row[j])
                out[j] = np.float32(byte & 15) * scale + zero
                out[n // 2 + j] = np.float32(byte >> 4) * scale + zero
        else:
            for j in range(n):
                out[j] = np.float32(row[j]) * scale + zero


@_exactly
def _unpack(packed, scales, bits, x):
    if x.shape[1] == 64:
        _read_any(packed, 64, scales, bits, x)
    elif x.shape[1] == 128:
        _read_any(packed, 128, scales, bits, x)
    elif x.shape[1] == 32:
        _read_any(packed, 32, scales, bits, x)
    else:
        _read_any(packed, x.shape[1], scales, bits, x)


def ends(x: torch.Tensor, shares: tuple[float, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the grid of each vector of `x` `[vectors, n]`, float32, begins and ends, `[vectors, 1]` each.

    Without `shares` at its minimum and maximum; else shrunk about the middle to that share of the range at which a
    2-bit grid errs least. NaN for a vector that holds anything but finite numbers.
    """
    low, high = x.new_empty(len(x), 1), x.new_empty(len(x), 1)
    numbers, steps = x.numpy(), np.array(shares, dtype=np.float32)
    _ends(numbers, numbers.view(np.int32), steps, low.numpy()[:, 0], high.numpy()[:, 0])
    return low, high


def pack(
    x: torch.Tensor, scales: torch.Tensor, bits: int, limits: tuple[float, float] | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest codes of `x` `[vectors, n]` for `scales` `[vectors, 2]` (scale, zero), packed like `pack_codes`.

    With them, if there are `limits` to it, what these scales are to be stretched by, `[vectors, 1]` (see `quantize`).
    """
    packed = x.new_empty(len(x), x.shape[1] * bits // 8, dtype=torch.uint8)
    stretch = x.new_empty(len(x) if limits else 0, 1)
    _pack(x.numpy(), scales.numpy(), bits, packed.numpy(), stretch.numpy()[:, 0], np.array(limits or (), np.float32))
    return packed, stretch if limits else None


def unpack(packed: torch.Tensor, scales: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack` up to its error: float32 `[vectors, n]`, the same numbers as `quantization.dequantize`'s."""
    x = scales.new_empty(len(packed), packed.shape[1] * 8 // bits)
    _unpack(packed.numpy(), scales.numpy(), bits, x.numpy())
    return x
