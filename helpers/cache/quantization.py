"""Bits and bytes: how one vector of a key or value becomes packed codes with a scale and a zero, and back.

Knows nothing of caches or tokens. Vectors lie along the last dimension; every leading dimension is a batch. Keys and
values are rotated before they come here (see `rotation_matrix`), which spreads outlier channels so that one scale per
vector is enough (QuaRot, arXiv 2404.00456).
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial
from types import ModuleType

import torch

WIDTHS = (2, 4, 8, 16)
FULL_WIDTH = 16
Widths = int | tuple[int, int]  # of keys and values alike, or (key bits, value bits)
# Shares of the half range that the 2-bit step search tries; a Gaussian vector of 32-256 elements is best at 0.5-0.7.
STEP_SEARCH = tuple(1.0 - 0.05 * i for i in range(12))
STRETCH = 0.5, 2.0  # of scale and zero, at least and at most; a Gaussian vector at 2 bits takes 1.1 to 1.2
NUMBERS_AT_ONCE = 2**18  # of the search by tensor operations: few operations for a block, and bounded memory


def check_width(bits: int, name: str = "bits") -> int:
    """Return `bits` if it is one of 2, 4, 8, 16; raise `ValueError` naming the argument otherwise."""
    if bits not in WIDTHS:
        raise ValueError(f"{name} must be one of {WIDTHS}, got {bits!r}")
    return int(bits)


def width_pair(bits: Widths, name: str = "bits") -> tuple[int, int]:
    """Key bits and value bits of a width or a pair; raises `ValueError` for anything else."""
    pair = tuple(bits) if isinstance(bits, tuple | list) else (bits, bits)
    if len(pair) != 2:
        raise ValueError(f"{name} must be a width or a pair (key bits, value bits), got {bits!r}")
    return check_width(pair[0], name), check_width(pair[1], name)


def bytes_per_vector(head_dim: int, bits: int) -> int:
    """Bytes of the codes of one vector; raises `ValueError` where they would not fill whole bytes."""
    check_width(bits)
    if head_dim * bits % 8:
        raise ValueError(f"head_dim must be a multiple of {8 // bits} to be packed at {bits} bits, got {head_dim}")
    return head_dim * bits // 8


@lru_cache(maxsize=16)
def rotation_matrix(head_dim: int, seed: int = 0) -> torch.Tensor:
    """A fixed orthogonal matrix `[head_dim, head_dim]`, float64; a row vector `x` is rotated as `x @ R`.

    Randomised Hadamard (Sylvester's construction, random signs) where `head_dim` is a power of two, else the Q of a
    seeded QR decomposition.
    """
    generator = torch.Generator().manual_seed(seed)
    if head_dim & (head_dim - 1) == 0:
        hadamard = torch.ones(1, 1, dtype=torch.float64)
        while hadamard.shape[0] < head_dim:
            hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
        signs = torch.randint(0, 2, (head_dim, 1), generator=generator).double() * 2 - 1
        return signs * hadamard / math.sqrt(head_dim)
    gaussian = torch.randn(head_dim, head_dim, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(gaussian).Q.contiguous()


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack `uint8` codes `[..., n]`, each below `2**bits`, into `uint8 [..., n * bits / 8]`.

    With `p = 8 / bits` codes a byte, byte `j` holds the codes `j, j + n/p, j + 2n/p, ...`, lowest bits first: each
    bit field of a run of bytes unpacks to a contiguous run of the vector.
    """
    per_byte = 8 // bits
    if per_byte == 1:
        return codes
    fields = codes.unflatten(-1, (per_byte, -1))
    packed = fields[..., 0, :].clone()
    for field in range(1, per_byte):
        packed |= fields[..., field, :] << (bits * field)
    return packed


def unpack_codes(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack_codes`: `uint8 [..., n * bits / 8]` to `uint8 [..., n]`."""
    per_byte = 8 // bits
    if per_byte == 1:
        return packed
    mask = 2**bits - 1
    return torch.cat([(packed >> (bits * field)) & mask for field in range(per_byte)], dim=-1)


def quantize(
    x: torch.Tensor,
    bits: int,
    search: bool = True,
    stretch: bool = True,
    note: Callable[..., None] = lambda *tensors: None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize vectors to uniform codes.

    `x`: float `[..., n]`. Returns packed codes `uint8 [..., n * bits / 8]` and `float16 [..., 2]` holding scale and
    zero; a code `c` stands for `zero + scale * c`. The grid spans minimum to maximum; at 2 bits with `search` it is
    shrunk about its middle to the step of least squared error. With `stretch`, below 8 bits, scale and zero are then
    multiplied by what makes the vector that comes back as long along `x` as `x` is: its error is at right angles to
    `x`, and a query in the direction of a key meets all of it. `bits` is 2, 4 or 8. `note` is told of the larger
    tensors that are made on the way.
    """
    shares, shape = STEP_SEARCH if search and bits == 2 else (), x.shape[:-1]
    if x.device.type == "cpu" and x.dtype == torch.float32 and (loops := _compiled()):
        x = x.detach().reshape(-1, x.shape[-1]).contiguous()
        (low, high), pack = loops.ends(x, shares), loops.pack
    else:
        (low, high), pack = _ends(x, shares, note), partial(_pack, note=note)
    scales = torch.cat([(high - low) / (2**bits - 1), low], dim=-1).to(torch.float16)
    # Codes are chosen for the rounded scale and zero, which are the ones that reading them back will use.
    exact = scales.to(x.dtype)
    note(x, low, high, scales, exact)
    packed, factor = pack(x, exact, bits, STRETCH if stretch and bits < 8 else None)
    if factor is not None:
        scales = (exact * factor).to(torch.float16)
        note(factor, scales)
    note(packed)
    return packed.view(*shape, -1), scales.view(*shape, 2)


@lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    """The inner loops compiled for this processor, None where they cannot be."""
    try:
        from helpers.cache import quantization_cpu

        quantization_cpu.ends(torch.zeros(1, 4), ())
    except Exception as error:  # whatever a compiler raises
        print(f"quantizing without compiled loops ({type(error).__name__}: {error})")
        return None
    return quantization_cpu


def _ends(x: torch.Tensor, shares: tuple[float, ...], note: Callable[..., None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ends `[..., 1]` of the vectors' grids: their range, or of `shares` of it the one that changes them least."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    note(low, high)
    if not shares:
        return low, high
    middle, half = (low + high) / 2, (high - low) / 2
    best_error, best_half = torch.full_like(low, torch.inf), half
    note(middle, half, best_error)
    at_once = max(1, NUMBERS_AT_ONCE // max(1, x.numel()))
    for some in torch.tensor(shares, dtype=x.dtype, device=x.device).split(at_once):
        error, best_here = _best_of(x, middle, half * some.view(-1, *[1] * x.ndim), note)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_half = torch.where(better, best_here, best_half)
        note(error, best_here, better, best_error, best_half)
    return middle - best_half, middle + best_half


def _best_of(
    x: torch.Tensor, middle: torch.Tensor, halves: torch.Tensor, note: Callable[..., None]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The least squared error of 2-bit grids that reach `halves` `[grids, ..., 1]` from the middle, and whose it is."""
    scale, zero = 2 * halves / 3, middle - halves
    note(halves, scale, zero)
    rounded = _round_to_grid(x, scale, zero, 2, note)
    error = rounded.mul_(scale).add_(zero).sub_(x).square_().sum(-1, keepdim=True)
    note(error)
    error, which = error.min(0, keepdim=True)
    return error[0], halves.gather(0, which)[0]


def _pack(
    x: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    limits: tuple[float, float] | None,
    note: Callable[..., None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The nearest codes of `x` for `scales` `[..., 2]`, packed, and by what to stretch these within `limits`."""
    scale, zero = scales.split(1, dim=-1)
    codes = _round_to_grid(x, scale, zero, bits, note, torch.uint8)
    stretch = None
    if limits:
        back = codes.to(x.dtype).mul_(scale).add_(zero)
        squares, along = x.square(), back * x
        note(back, squares, along)
        squares, along = squares.sum(-1, keepdim=True), along.sum(-1, keepdim=True)
        stretch = torch.where(along > 0, (squares / along).clamp(*limits), torch.ones_like(along))
    return pack_codes(codes, bits), stretch


def _round_to_grid(
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    bits: int,
    note: Callable[..., None],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The nearest codes, in `dtype` or as they come."""
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    rounded = (x - zero).div_(safe).round_().clamp_(0, 2**bits - 1)
    codes = rounded if dtype is None else rounded.to(dtype)
    note(safe, rounded, codes)
    return codes


def dequantize(
    packed: torch.Tensor,
    scales: torch.Tensor,
    bits: int,
    dtype: torch.dtype,
    note: Callable[..., None] = lambda *tensors: None,
) -> torch.Tensor:
    """Inverse of `quantize` up to its error: `[..., n]` in `dtype`; `note` is told of what is made."""
    exact = scales.to(dtype)
    if packed.device.type == "cpu" and dtype == torch.float32 and (loops := _compiled()):
        rows = packed.reshape(-1, packed.shape[-1]).contiguous()
        x = loops.unpack(rows, exact.reshape(-1, 2), bits)
        note(exact, rows, x)
        return x.view(*packed.shape[:-1], x.shape[-1])
    codes = unpack_codes(packed, bits)
    scale, zero = exact.split(1, dim=-1)
    x = codes.to(dtype)
    note(exact, codes, x)
    return x.mul_(scale).add_(zero)
