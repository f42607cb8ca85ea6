"""What keys are centred by: a vector of each layer, row and head, which may turn with the position of a token's block.

Keys carry a constant, such as a bias of their projection, which rotary embedding turns with position. `Centre` takes
the mean of un-rotated keys and turns it to the middle of each block; so the slots of a block share one vector.
"""

from collections.abc import Callable

import torch

from helpers.cache.rotary import Rotary

CENTRE_TOKENS = 16  # real tokens that are there before anything is coded
MEAN_TOKENS = 64  # whose mean is the centre, at most
CELLS_AT_ONCE = 16  # by which the table of phases grows
EVERYWHERE = 2**40  # tokens of a cell of a centre that does not turn


class Centre:
    """Centring vectors of L layers, B rows and H heads; `mean` `[L, B, H, D]` is None until it is fixed.

    Of keys only: centring values gains nothing.
    """

    def __init__(
        self,
        rotary: Rotary,
        block: int,
        sinks: int,
        note: Callable[..., None] = lambda *tensors: None,
    ):
        """`rotary` is how keys turn, if at all; the first `sinks` real tokens are left out of the mean."""
        self.rotary, self.sinks, self.note = rotary, sinks, note
        self.turns = self.rotary.pairs > 0
        self.cell = block if self.turns else EVERYWHERE  # tokens that share one vector
        self.mean: torch.Tensor | None = None
        self.phases: torch.Tensor | None = None  # [cells, D], of the middle of each cell, where it turns

    @property
    def needed(self) -> int:
        """How many of the first tokens it looks at, where none are padding."""
        return self.sinks + MEAN_TOKENS

    def fix(
        self,
        states: torch.Tensor,
        real: torch.Tensor | None = None,
        layers: slice = slice(None),
        count: int | None = None,
    ) -> None:
        """Fix the vectors of the layers `layers` of `count` (default: of all) by their first keys `[L, B, H, n, D]`.

        `states` start at position 0; `real` `[B, n]` is False for padding, and None where there is none.
        """
        if real is None:
            states = states[:, :, :, : self.needed]
            real = torch.ones(states.shape[1], states.shape[3], dtype=torch.bool, device=states.device)
        number, dtype = real.cumsum(-1), torch.promote_types(states.dtype, torch.float32)
        looked_at = int((number <= self.needed).any(0).sum())
        states, real, number = states[:, :, :, :looked_at], real[:, :looked_at], number[:, :looked_at]
        weights = (real & (number > self.sinks) & (number <= self.needed)).to(dtype)
        states = states.detach().to(dtype)
        if self.turns:
            positions = torch.arange(states.shape[3], device=states.device)
            states = self.rotary.turn(states, self.rotary.phases(positions, states.shape[4], dtype), back=True)
            self.note(states)
        # No matrix product: its last digits depend on how many layers are coded together.
        weights = weights[None, :, None, :, None]
        # What is no number is found when its own block is coded, not in every block by way of the mean.
        counted = (states * weights).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        mean = counted.sum(3) / weights.sum(3)
        if self.mean is None:
            self.mean = mean.new_zeros(count or len(mean), *mean.shape[1:])
            self.note(self.mean)
        self.mean[layers] = mean

    def reserve(self, length: int) -> bool:
        """Have the phases of `length` tokens, before any of them is coded or read; whether there are new ones."""
        cells = -(-length // self.cell)
        if not self.turns or self.mean is None or (self.phases is not None and len(self.phases) >= cells):
            return False
        cells = -(-cells // CELLS_AT_ONCE) * CELLS_AT_ONCE
        middles = torch.arange(cells, device=self.mean.device) * float(self.cell) + (self.cell - 1) / 2
        self.phases = self.rotary.phases(middles, self.mean.shape[-1], self.mean.dtype)
        self.note(self.phases)
        return True

    def of(self, start: torch.Tensor, layers: int | slice = slice(None)) -> torch.Tensor:
        """The vectors of tokens whose blocks begin at `start` `[1, B, 1, n]`, or `[B, 1, n]` of one layer.

        `[L, B, H, n, D]` or `[B, H, n, D]`; n is 1 where all tokens share theirs.
        """
        mean = self.mean[layers].unsqueeze(-2)
        if not self.turns:
            return mean
        turned = self.rotary.turn(mean, self.phases[start.long() // self.cell])
        self.note(turned)
        return turned

    def scores(self, query: torch.Tensor, start: torch.Tensor, layer: int) -> torch.Tensor:
        """`query . centre` `[B, H, G, Q, n]` for grouped queries `[B, H, G, Q, D]`; n is 1 where tokens share it."""
        scores = self.by_cell(query, layer)
        if not self.turns:
            return scores
        cells = (start.long() // self.cell)[:, :, None, None]  # [B, 1, 1, 1, n]
        return scores.gather(-1, cells.expand(*scores.shape[:-1], cells.shape[-1]))

    def by_cell(self, query: torch.Tensor, layer: int) -> torch.Tensor:
        """`query . centre` of each cell `[B, H, G, Q, cells]` for grouped queries `[B, H, G, Q, D]`."""
        mean = self.mean[layer][:, :, None, None]
        if not self.turns:
            return (query * mean).sum(-1, keepdim=True)
        return self.rotary.products(query, mean) @ self.phases.T

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the vectors by what `change` makes of `mean`."""
        if self.mean is not None:
            self.mean = change(self.mean)

    def to(self, device: torch.device | str) -> None:
        """Move to another device."""
        self.mean, self.phases = (None if x is None else x.to(device) for x in (self.mean, self.phases))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """Every tensor that is held."""
        return tuple(x for x in (self.mean, self.phases) if x is not None)
