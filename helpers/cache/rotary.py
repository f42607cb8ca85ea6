"""How rotary embedding turns keys with their position (RoFormer, arXiv 2104.09864), as far as it is known.

Knows configurations, not models: which numbers of a head make pairs, and how fast each pair turns.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


@dataclass(frozen=True)
class Rotary:
    """The numbers `i` and `i + pairs` of a head turn together by `position * frequencies[i]`; the rest stay.

    Without frequencies nothing turns. What is said here need not be what a model does: everything that is built on
    it is exact for any frequencies, and small where they are right.
    """

    frequencies: tuple[float, ...] = ()

    @property
    def pairs(self) -> int:
        return len(self.frequencies)

    def phases(self, positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """For `positions` `[n]` the cosines and sines of all pairs, then ones: `[n, head_dim]`."""
        rates = torch.tensor(self.frequencies, dtype=torch.float64, device=positions.device)
        angles = positions.double()[:, None] * rates
        ones = angles.new_ones(len(positions), head_dim - 2 * self.pairs)
        return torch.cat([angles.cos(), angles.sin(), ones], dim=-1).to(dtype)

    def turn(self, x: torch.Tensor, phases: torch.Tensor, back: bool = False) -> torch.Tensor:
        """Vectors `[..., D]` turned by `phases` `[..., D]`, or turned `back`; leading dimensions broadcast."""
        n, sign = self.pairs, -1 if back else 1
        out = x.new_empty(*torch.broadcast_shapes(x.shape, phases.shape))
        first, second, cosines, sines = x[..., :n], x[..., n : 2 * n], phases[..., :n], phases[..., n : 2 * n]
        torch.mul(first, cosines, out=out[..., :n]).addcmul_(second, sines, value=-sign)
        torch.mul(second, cosines, out=out[..., n : 2 * n]).addcmul_(first, sines, value=sign)
        out[..., 2 * n :] = x[..., 2 * n :]
        return out

    def products(self, query: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """`[..., D]` whose dot product with the phases of a position is `query . turn(x, phases)`."""
        n = self.pairs
        a, b, first, second = query[..., :n], query[..., n : 2 * n], x[..., :n], x[..., n : 2 * n]
        return torch.cat([a * first + b * second, b * first - a * second, query[..., 2 * n :] * x[..., 2 * n :]], -1)


def rotary_of(config: PreTrainedConfig, head_dim: int) -> Rotary:
    """The rotary embedding that a configuration describes: partial and scaled ones too; none where it has none."""
    parameters = getattr(config, "rope_parameters", None) or {}
    one_of = {"layer_type": "full_attention"} if "full_attention" in parameters else {}  # a set for each type of layer
    parameters = parameters["full_attention"] if one_of else parameters
    if "rope_theta" not in parameters:
        return Rotary()
    kind = parameters.get("rope_type", "default")
    if kind in ROPE_INIT_FUNCTIONS:
        frequencies, _ = ROPE_INIT_FUNCTIONS[kind](config, **one_of)
    else:
        size = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        frequencies = parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    frequencies = frequencies.double().flatten()[: head_dim // 2]
    return Rotary(tuple(frequencies.tolist()))
