"""How one side, keys or values, is coded: centred, rotated, quantized, and back.

A `Codec` turns states into `Codes` and `Codes` into states; keys have one codec and values another. It knows nothing
of tokens, buckets or layers, but that the leading dimensions of states are L layers, B rows and H key/value heads.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field

import torch

from helpers.cache.balance import Balance
from helpers.cache.centre import Centre
from helpers.cache.quantization import FULL_WIDTH, bytes_per_vector, dequantize, quantize, rotation_matrix
from helpers.cache.rotary import Rotary

QUANTIZERS = ("rotated", "minmax")
CENTRES = ("rotary", "none")  # what keys are centred by


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
        basis: torch.Tensor | None = None,
        dual: torch.Tensor | None = None,
        centre: Centre | None = None,
        stretch: bool = False,
        note: Callable[..., None] = lambda *tensors: None,
    ):
        """`dtype` is the states'. Without `basis` states are coded as they are, minimum to maximum.

        `basis` `[D, D]`, or `[L, 1, H, D, D]` of each head, is what centred states are multiplied by; `dual` is the
        transpose of its inverse (a rotation's is the rotation): what is to meet states is multiplied by that. `stretch`
        is of `quantize`. `note` is told of the larger tensors that are made on the way.
        """
        self.note, self.stretch = note, stretch
        self.dtype = torch.promote_types(dtype, torch.float32)  # of all arithmetic
        self.full_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16  # of 16-bit codes
        self.basis, self.dual, self.centre = basis, basis if dual is None else dual, centre

    def __deepcopy__(self, memo: dict) -> "Codec":
        if self.per_head:  # the model's, see `Balance`
            memo |= {id(x): x for x in (self.basis, self.dual)}
        copied = memo[id(self)] = Codec.__new__(Codec)
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    @property
    def per_head(self) -> bool:
        """Whether heads have a basis of their own."""
        return self.basis is not None and self.basis.ndim > 2

    def keep_layers(self, count: int) -> None:
        """Let go of all but the first `count` layers."""
        if self.per_head:
            self.basis, self.dual = self.basis[:count], self.dual[:count]
        if self.centre is not None:
            self.centre.map(lambda mean: mean[:count].clone())

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        same = self.dual is self.basis
        self.basis = None if self.basis is None else self.basis.to(device)
        self.dual = self.basis if same else self.dual.to(device)
        if self.centre is not None:
            self.centre.to(device)

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that the cache owns; a balance belongs to the model."""
        centre = () if self.centre is None else self.centre.tensors()
        return centre if self.basis is None or self.per_head else (self.basis, *centre)

    def _of(self, matrix: torch.Tensor, layers: int | slice) -> torch.Tensor:
        return matrix[layers] if self.per_head else matrix

    def encode(self, states: torch.Tensor, bits: int, start: torch.Tensor, layers: slice = slice(None)) -> Codes:
        """Codes of the `states` of some layers, whose blocks begin at `start` `[1, B, 1, n]`; 16 bits is half
        precision as is.

        Raises `ValueError` for a D that fills no whole bytes.
        """
        bytes_per_vector(states.shape[-1], bits)
        if bits == FULL_WIDTH:
            return self._noted(Codes(bits, states.to(self.full_dtype).contiguous().view(torch.uint8)))
        return self._quantize(self._turned(states.to(self.dtype), start, layers), bits)

    def _turned(self, x: torch.Tensor, start: torch.Tensor, layers: slice) -> torch.Tensor:
        """States in the coordinates in which they are quantized: centred, balanced and rotated."""
        self.note(x)
        if self.centre is not None:
            x = x - self.centre.of(start, layers)
            self.note(x)
        if self.basis is None:
            return x
        turned = x @ self._of(self.basis, layers)
        self.note(turned)
        return turned

    def _quantize(self, turned: torch.Tensor, bits: int) -> Codes:
        return self._noted(Codes(bits, *quantize(turned, bits, self.basis is not None, self.stretch, self.note)))

    def _noted(self, codes: Codes) -> Codes:
        self.note(codes.codes, *(() if codes.scales is None else (codes.scales,)))
        return codes

    def turned_query(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """Grouped queries `[B, H, G, Q, D]` in the coordinates of one layer's stored keys."""
        dual = self._of(self.dual, layer)
        return query @ (dual.unsqueeze(-3) if self.per_head else dual)

    def read(self, codes: Codes) -> torch.Tensor:
        """The numbers that are stored: at 16 bits the states themselves, below that their centred, rotated form."""
        if codes.bits == FULL_WIDTH:
            x = codes.codes.contiguous().view(self.full_dtype).to(self.dtype)
            self.note(x)
            return x
        return dequantize(codes.codes, codes.scales, codes.bits, self.dtype, self.note)

    def decode(self, codes: Codes, start: torch.Tensor, layer: int | slice = slice(None)) -> torch.Tensor:
        """Inverse of `encode` up to its error, for codes of all layers or of one: `[(L,) B, H, n, D]`."""
        x = self.read(codes)
        if codes.bits == FULL_WIDTH:
            return x
        if self.basis is not None:
            back = x @ self._of(self.dual, layer).mT
            self.note(back)
            x = back
        return x if self.centre is None else x.add_(self.centre.of(start, layer))

    def requantize(
        self, codes: Codes, bits: int, start: torch.Tensor, want_error: bool = False, layers: slice = slice(None)
    ) -> tuple[Codes, torch.Tensor | None]:
        """The same vectors at another width and, if wanted, how far each moved: squared error `[L, B, H, n]`.

        Balanced keys move in the coordinates in which their errors count alike.
        """
        if codes.bits == bits:
            return codes, codes.codes.new_zeros(codes.codes.shape[:-1], dtype=self.dtype)
        # Two widths below 16 code the same centred, rotated numbers, in which distances are the same.
        plain = FULL_WIDTH in (codes.bits, bits)
        before = self.decode(codes, start, layers) if plain else self.read(codes)
        coded = self.encode(before, bits, start, layers) if plain else self._quantize(before, bits)
        if not want_error:
            return coded, None
        after = self.decode(coded, start, layers) if plain else self.read(coded)
        change = after.sub_(before)
        change = change @ self._of(self.basis, layers) if plain and self.per_head else change
        return coded, change.square_().sum(-1)

    def relative_error(
        self, states: torch.Tensor, bits: int, start: torch.Tensor, layers: slice = slice(None)
    ) -> torch.Tensor:
        """Squared error of storing the `states` of some layers, over their squared length: `[L, B, H, n]`.

        Of balanced keys both are taken in the coordinates in which their errors count alike.
        """
        x = states.to(self.dtype)
        if bits == FULL_WIDTH:
            change = states.to(self.full_dtype).to(self.dtype) - x
        else:
            turned = self._turned(x, start, layers)  # where distances are the same
            change = self.read(self._quantize(turned, bits)).sub_(turned)
        if self.per_head:
            x = x @ self._of(self.basis, layers)
            change = change @ self._of(self.basis, layers) if bits == FULL_WIDTH else change
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


@dataclass(frozen=True)
class Coding:
    """How a cache codes its tokens: what a user chose, and what its model is like."""

    quantizer: str = "rotated"  # or "minmax": neither rotated nor centred nor balanced
    block: int = 16
    sinks: int = 4  # first real tokens of a row that stay at 16 bits
    centre: str = "rotary"  # of keys; one of `CENTRES`
    rotary: Rotary = field(default_factory=Rotary)  # how the model turns keys
    balance: Balance | None = None
    stretch: bool = True  # codes until they are as long as what they stand for; of rotated ones

    @property
    def needs_no_tokens(self) -> bool:
        """Whether tokens can be coded before `CENTRE_TOKENS` are there, to be centred or told from sinks."""
        return not self.sinks and (self.quantizer == "minmax" or self.centre == "none")

    def codecs(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        layers: list[int],
        note: Callable[..., None] = lambda *tensors: None,
    ) -> tuple[Codec, Codec]:
        """Codecs for states like `keys` and `values` `[..., D]` of the `layers`, by number, of a model."""
        if self.quantizer == "minmax":
            return Codec(keys.dtype, note=note), Codec(keys.dtype, note=note)
        dims = keys.shape[-1], values.shape[-1]
        dtype = torch.promote_types(keys.dtype, torch.float32)
        rotations = {dim: rotation_matrix(dim).to(keys.device, dtype) for dim in dims}
        note(*rotations.values())
        turns = (rotations[dims[0]],) * 2
        if self.balance is not None:
            turns = self.balance.turns(layers, keys.device, dtype)
        centre = None
        if self.centre != "none":
            centre = Centre(self.rotary, self.block, self.sinks, note)
        value = Codec(keys.dtype, rotations[dims[1]], stretch=self.stretch, note=note)
        return Codec(keys.dtype, *turns, centre, self.stretch, note), value
