"""How one side, keys or values, is coded: centred, rotated, quantized, and back.

A `Codec` turns states into `Codes` and `Codes` into states; keys have one codec and values another. It knows nothing
of tokens, buckets or layers, but that the leading dimensions of states are L layers, B rows and H key/value heads.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from helpers.cache.quantization import FULL_WIDTH, bytes_per_vector, dequantize, quantize, rotation_matrix

QUANTIZERS = ("rotated", "minmax")
CENTRE_TOKENS = 16  # whose mean centres the keys
# Keys are centred by half the mean of their first tokens. Rotary embedding turns the mean of distant keys away from
# that of the first: with all of it 4-bit KL on far tokens of real text is 0.019, with half 0.015, with none 0.014;
# on texts of 256 tokens that the model wrote itself 0.010, 0.010 and 0.015 (stories3M). Centring values gains nothing.
CENTRE_SHARE = 0.5


@dataclass
class Codes:
    """Vectors `[..., D]` as they are stored at `bits`."""

    bits: int
    codes: torch.Tensor  # uint8 [..., bytes of a vector]; at 16 bits the bytes of half-precision numbers
    scales: torch.Tensor | None = None  # float16 [..., 2]: scale and zero; None at 16 bits

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Codes":
        """The same vectors with every tensor changed alike."""
        return Codes(self.bits, change(self.codes), None if self.scales is None else change(self.scales))


class Codec:
    """Codes for keys or for values `[L, B, H, n, D]` of one head dimension and one dtype."""

    def __init__(self, dtype: torch.dtype, rotation: torch.Tensor | None = None):
        """`dtype` is the states'. Without `rotation` `[D, D]` states are coded as they are, minimum to maximum."""
        self.dtype = torch.promote_types(dtype, torch.float32)  # of all arithmetic
        self.full_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16  # of 16-bit codes
        self.rotation = rotation
        self.centre: torch.Tensor | None = None  # [L, B, H, D]

    def set_centre(self, states: torch.Tensor, real: torch.Tensor | None = None) -> None:
        """Fix the centring vectors: a share of the mean of the first `CENTRE_TOKENS` of `states` that are no padding.

        `real` `[B, n]` is False for padding; without it there is none.
        """
        if real is None:
            states = states[:, :, :, :CENTRE_TOKENS]
            real = torch.ones(states.shape[1], CENTRE_TOKENS, dtype=torch.bool, device=states.device)
        weights = (real & (real.cumsum(-1) <= CENTRE_TOKENS)).to(self.dtype)
        mean = torch.einsum("lbhnd,bn->lbhd", states.to(self.dtype), weights) / weights.sum(-1)[None, :, None, None]
        self.centre = (CENTRE_SHARE * mean).contiguous()  # einsum leaves any order of strides

    def encode(self, states: torch.Tensor, bits: int) -> Codes:
        """Codes of `states`; 16 bits is half precision as is. Raises `ValueError` for a D that fills no whole bytes."""
        bytes_per_vector(states.shape[-1], bits)
        if bits == FULL_WIDTH:
            return Codes(bits, states.to(self.full_dtype).contiguous().view(torch.uint8))
        return self._quantize(self._turned(states.to(self.dtype)), bits)

    def _turned(self, x: torch.Tensor) -> torch.Tensor:
        """States in the coordinates in which they are quantized: centred and rotated."""
        x = x if self.centre is None else x - self.centre.unsqueeze(-2)
        return x if self.rotation is None else x @ self.rotation

    def _quantize(self, turned: torch.Tensor, bits: int) -> Codes:
        return Codes(bits, *quantize(turned, bits, search=self.rotation is not None))

    def read(self, codes: Codes) -> torch.Tensor:
        """The numbers that are stored: at 16 bits the states themselves, below that their centred, rotated form."""
        if codes.bits == FULL_WIDTH:
            return codes.codes.contiguous().view(self.full_dtype).to(self.dtype)
        return dequantize(codes.codes, codes.scales, codes.bits, self.dtype)

    def decode(self, codes: Codes, layer: int | slice = slice(None)) -> torch.Tensor:
        """Inverse of `encode` up to its error, for codes of all layers or of one: `[(L,) B, H, n, D]`."""
        x = self.read(codes)
        if codes.bits == FULL_WIDTH:
            return x
        x = x if self.rotation is None else x @ self.rotation.T
        return x if self.centre is None else x + self.centre[layer].unsqueeze(-2)

    def requantize(self, codes: Codes, bits: int, want_error: bool) -> tuple[Codes, torch.Tensor | None]:
        """The same vectors at another width and, if wanted, how far each moved: squared error `[L, B, H, n]`."""
        if codes.bits == bits:
            return codes, codes.codes.new_zeros(codes.codes.shape[:-1], dtype=self.dtype)
        # Two widths below 16 code the same centred, rotated numbers, in which distances are the same.
        plain = FULL_WIDTH in (codes.bits, bits)
        look = self.decode if plain else self.read
        before = look(codes)
        coded = self.encode(before, bits) if plain else self._quantize(before, bits)
        return coded, (look(coded) - before).square().sum(-1) if want_error else None

    def relative_error(self, states: torch.Tensor, bits: int) -> torch.Tensor:
        """Squared error of storing `states` at `bits`, over their squared length: `[L, B, H, n]`."""
        x = states.to(self.dtype)
        if bits == FULL_WIDTH:
            change = states.to(self.full_dtype).to(self.dtype) - x
        else:
            turned = self._turned(x)  # where distances are the same
            change = self.read(self._quantize(turned, bits)) - turned
        return change.square_().sum(-1) / x.square().sum(-1).clamp(min=1e-12)

    def magnitude(self, codes: Codes) -> torch.Tensor:
        """Sum of the magnitudes of all scales and zeros (at 16 bits: of the states), one float32.

        Codes are always sound. A state that is NaN makes this NaN; one that is infinite or too large, infinite or NaN.
        """
        held = codes.codes.view(self.full_dtype) if codes.scales is None else codes.scales
        return held.abs().sum(dtype=torch.float32)


def make_codecs(keys: torch.Tensor, values: torch.Tensor, quantizer: str) -> tuple[Codec, Codec]:
    """Codecs for states like `keys` and `values` `[..., D]`; equal head dimensions share one rotation."""
    if quantizer == "minmax":
        return Codec(keys.dtype), Codec(keys.dtype)
    dims = keys.shape[-1], values.shape[-1]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    rotations = {dim: rotation_matrix(dim).to(keys.device, dtype) for dim in dims}
    return Codec(keys.dtype, rotations[dims[0]]), Codec(keys.dtype, rotations[dims[1]])
