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

    def __init__(
        self,
        dtype: torch.dtype,
        rotation: torch.Tensor | None = None,
        note: Callable[..., None] = lambda *tensors: None,
    ):
        """`dtype` is the states'. Without `rotation` `[D, D]` states are coded as they are, minimum to maximum.

        `note` is told of the larger tensors that are made on the way.
        """
        self.note = note
        self.dtype = torch.promote_types(dtype, torch.float32)  # of all arithmetic
        self.full_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16  # of 16-bit codes
        self.rotation = rotation
        self.centre: torch.Tensor | None = None  # [L, B, H, D]

    def set_centre(
        self,
        states: torch.Tensor,
        real: torch.Tensor | None = None,
        layers: slice = slice(None),
        count: int | None = None,
    ) -> None:
        """Fix the centring vectors of the layers `layers` of `count` (default: of all), of which `states` are.

        They are a share of the mean of the first `CENTRE_TOKENS` tokens that are no padding; `real` `[B, n]` is False
        for padding, and None where there is none.
        """
        if real is None:
            states = states[:, :, :, :CENTRE_TOKENS]
            real = torch.ones(states.shape[1], CENTRE_TOKENS, dtype=torch.bool, device=states.device)
        weights = (real & (real.cumsum(-1) <= CENTRE_TOKENS)).to(self.dtype)
        # No matrix product: its last digits depend on how many layers are coded together.
        weights = weights[None, :, None, :, None]
        mean = (states.to(self.dtype) * weights).sum(3) / weights.sum(3)
        if self.centre is None:
            self.centre = mean.new_zeros(count or len(mean), *mean.shape[1:])
            self.note(self.centre)
        self.centre[layers] = CENTRE_SHARE * mean

    def encode(self, states: torch.Tensor, bits: int, layers: slice = slice(None)) -> Codes:
        """Codes of the `states` of some layers; 16 bits is half precision as is.

        Raises `ValueError` for a D that fills no whole bytes.
        """
        bytes_per_vector(states.shape[-1], bits)
        if bits == FULL_WIDTH:
            return self._noted(Codes(bits, states.to(self.full_dtype).contiguous().view(torch.uint8)))
        return self._quantize(self._turned(states.to(self.dtype), layers), bits)

    def _turned(self, x: torch.Tensor, layers: slice) -> torch.Tensor:
        """States in the coordinates in which they are quantized: centred and rotated."""
        self.note(x)
        if self.centre is not None:
            x = x - self.centre[layers].unsqueeze(-2)
            self.note(x)
        if self.rotation is None:
            return x
        turned = x @ self.rotation
        self.note(turned)
        return turned

    def _quantize(self, turned: torch.Tensor, bits: int) -> Codes:
        return self._noted(Codes(bits, *quantize(turned, bits, self.rotation is not None, self.note)))

    def _noted(self, codes: Codes) -> Codes:
        self.note(codes.codes, *(() if codes.scales is None else (codes.scales,)))
        return codes

    def read(self, codes: Codes) -> torch.Tensor:
        """The numbers that are stored: at 16 bits the states themselves, below that their centred, rotated form."""
        if codes.bits == FULL_WIDTH:
            x = codes.codes.contiguous().view(self.full_dtype).to(self.dtype)
            self.note(x)
            return x
        return dequantize(codes.codes, codes.scales, codes.bits, self.dtype, self.note)

    def decode(self, codes: Codes, layer: int | slice = slice(None)) -> torch.Tensor:
        """Inverse of `encode` up to its error, for codes of all layers or of one: `[(L,) B, H, n, D]`."""
        x = self.read(codes)
        if codes.bits == FULL_WIDTH:
            return x
        if self.rotation is not None:
            back = x @ self.rotation.T
            self.note(back)
            x = back
        return x if self.centre is None else x.add_(self.centre[layer].unsqueeze(-2))

    def requantize(
        self, codes: Codes, bits: int, want_error: bool = False, layers: slice = slice(None)
    ) -> tuple[Codes, torch.Tensor | None]:
        """The same vectors at another width and, if wanted, how far each moved: squared error `[L, B, H, n]`."""
        if codes.bits == bits:
            return codes, codes.codes.new_zeros(codes.codes.shape[:-1], dtype=self.dtype)
        # Two widths below 16 code the same centred, rotated numbers, in which distances are the same.
        plain = FULL_WIDTH in (codes.bits, bits)
        before = self.decode(codes, layers) if plain else self.read(codes)
        coded = self.encode(before, bits, layers) if plain else self._quantize(before, bits)
        if not want_error:
            return coded, None
        after = self.decode(coded, layers) if plain else self.read(coded)
        return coded, after.sub_(before).square_().sum(-1)

    def relative_error(self, states: torch.Tensor, bits: int, layers: slice = slice(None)) -> torch.Tensor:
        """Squared error of storing the `states` of some layers, over their squared length: `[L, B, H, n]`."""
        x = states.to(self.dtype)
        if bits == FULL_WIDTH:
            change = states.to(self.full_dtype).to(self.dtype) - x
        else:
            turned = self._turned(x, layers)  # where distances are the same
            change = self.read(self._quantize(turned, bits)).sub_(turned)
        squares = x.square()
        self.note(change, squares)
        return change.square_().sum(-1) / squares.sum(-1).clamp(min=1e-12)

    def magnitude(self, codes: Codes) -> torch.Tensor:
        """Sum of the magnitudes of all scales and zeros (at 16 bits: of the states), one float32.

        Codes are always sound. A state that is NaN makes this NaN; one that is infinite or too large, infinite or NaN.
        """
        held = codes.codes.view(self.full_dtype) if codes.scales is None else codes.scales
        held = held.abs()
        self.note(held)
        return held.sum(dtype=torch.float32)


def make_codecs(
    keys: torch.Tensor, values: torch.Tensor, quantizer: str, note: Callable[..., None] = lambda *tensors: None
) -> tuple[Codec, Codec]:
    """Codecs for states like `keys` and `values` `[..., D]`; equal head dimensions share one rotation."""
    if quantizer == "minmax":
        return Codec(keys.dtype, note=note), Codec(keys.dtype, note=note)
    dims = keys.shape[-1], values.shape[-1]
    dtype = torch.promote_types(keys.dtype, torch.float32)
    rotations = {dim: rotation_matrix(dim).to(keys.device, dtype) for dim in dims}
    note(*rotations.values())
    return tuple(Codec(keys.dtype, rotations[dim], note) for dim in dims)
