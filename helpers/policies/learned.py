"""Learned policies: small networks that choose widths at commit, or rank tokens at settle.

`LearnedWidths` asks a network for the width of each token, from its features; `LearnedSchedule` follows a schedule by
age and asks a network how much harm it does to demote a token. `LearnedController.load` reads either from its files.
How the networks are trained is in `helpers.training`.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from helpers.cache import WIDTHS, Demotion, Step, Widths
from helpers.policies.features import TokenFeatures
from helpers.policies.network import Network
from helpers.policies.policy import Policy
from helpers.policies.rarity import TokenCounts
from helpers.policies.schedules import MIDDLE_SCHEDULE, Schedule

# What the networks read: the one that imitates the entropy rule (the assignment's features), the one that learned
# which widths are worth their bits, and the one that ranks.
IMITATION_FEATURES = ("entropy", "rarity", "attn_var")
COMMIT_FEATURES = (*IMITATION_FEATURES, "confidence", "surprisal", "key_error", "value_error")
SETTLE_FEATURES = ("received", "key_error", "value_error", "key_error_size", "value_error_size", "place")


class LearnedController(Policy):
    """A policy made of a trained network; `load` reads one."""

    @staticmethod
    def load(
        folder: str | Path,
        name: str = "settle",
        commit: Widths | None = None,
        steps: tuple[Step, ...] | None = None,
        average: float | None = None,
    ) -> "LearnedWidths | LearnedSchedule":
        """The controller `name` in `folder`.

        "settle" ranks what a schedule keeps, by default `MIDDLE_SCHEDULE`; "imitation" chooses widths as the
        entropy rule does, "commit" those that measurement found worth their bits; both take `average`, the width in
        bits that they are to have on average (as on their training texts). Raises `FileNotFoundError` where there is
        none, and `ValueError` for a file that is no such controller.
        """
        if name == "settle":
            network, _ = Network.load(folder, name, SETTLE_FEATURES, 1)
            commit = MIDDLE_SCHEDULE[0] if commit is None else commit
            return LearnedSchedule(commit, MIDDLE_SCHEDULE[1] if steps is None else steps, network=network)
        if name == "seed":
            raise ValueError("the controller 'seed' is now called 'imitation': load that, and rename files of your own")
        network, about = Network.load(folder, name, tuple(TokenFeatures.__dataclass_fields__), len(WIDTHS))
        try:
            rates = {float(rate): float(value) for rate, value in about.get("rates", {}).items()}
            numbers = {int(token): int(count) for token, count in about.get("token_counts", {}).items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"controller {name}: its rates or token counts are no numbers ({error})") from error
        if not np.isfinite([*rates, *rates.values()]).all() or min(numbers.values(), default=0) < 0:
            raise ValueError(f"controller {name}: its rates must be finite and its token counts 0 or more")
        controller = LearnedWidths(network, f"learned, {name}", rates=rates, start_counts=TokenCounts(numbers))
        return controller if average is None else controller.at_average(average)


@dataclass
class LearnedWidths(LearnedController):
    """Widths by a network that gives a token's features probabilities of 2, 4, 8 and 16 bits.

    The width of the highest `log p - multiplier * bits` is taken: the Lagrange multiplier, a price per bit in units
    of log-probability, moves the average (see `at_average`); at 0 it is the likeliest width.
    """

    network: Network
    name: str = "learned"
    multiplier: float = 0.0
    rates: dict[float, float] = field(default_factory=dict)  # average bits on the training texts -> multiplier
    start_counts: TokenCounts | None = None

    @property
    def needs(self) -> tuple[str, ...]:
        return self.network.features

    def at_average(self, average: float) -> "LearnedWidths":
        """A copy whose widths have this average on the training texts (interpolated between known rates)."""
        known = sorted(self.rates)
        if not known or not known[0] <= average <= known[-1]:
            span = f"{known[0]} and {known[-1]}" if known else "no known rates"
            raise ValueError(f"average must lie between {span} bits, got {average}")
        multiplier = float(np.interp(average, known, [self.rates[rate] for rate in known]))
        return replace(self, multiplier=multiplier, name=f"{self.name} at {average:g} bits")

    @torch.no_grad()
    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor:
        inputs = torch.stack([getattr(features, name) for name in self.network.features], dim=-1)
        return widths_at_multiplier(self.network(inputs.float()).log_softmax(-1), self.multiplier)


def widths_at_multiplier(log_probabilities: torch.Tensor, multiplier: float) -> torch.Tensor:
    """Width of the highest `log p - multiplier * bits`; `[..., 4]` gives integer `[...]`."""
    bits = torch.tensor(WIDTHS, device=log_probabilities.device)
    return bits[(log_probabilities - multiplier * bits).argmax(-1)]


@dataclass(frozen=True)
class LearnedSchedule(Schedule, LearnedController):
    """A schedule whose last step keeps the tokens that a network expects to suffer most by being demoted."""

    network: Network = field(kw_only=True)

    @property
    def name(self) -> str:
        return f"{self.movement}, {self.kept} by learned score"

    @torch.no_grad()
    def scores(self, demotion: Demotion) -> torch.Tensor:
        return self.network(settle_inputs(demotion))[..., 0]


def settle_inputs(demotion: Demotion) -> torch.Tensor:
    """What a `LearnedSchedule` reads of the tokens of settling blocks: `[L, B, H, slots, features]`, no logits needed.

    All in natural logarithms but the last: received attention and errors relative to the geometric mean of the block
    in that head; the sizes of the errors; and the token's place in its block, 0 to 1.
    """

    def by_block(x: torch.Tensor) -> torch.Tensor:
        return x.float().clamp(min=1e-6).log().unflatten(-1, (-1, demotion.block))

    def relative(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    key, value = by_block(demotion.key_error), by_block(demotion.value_error)
    received = by_block(demotion.received + 1e-4)
    place = torch.arange(demotion.block, device=key.device, dtype=key.dtype) / demotion.block
    columns = [relative(received), relative(key), relative(value), key, value, place.expand_as(key)]
    return torch.stack(columns, dim=-1).flatten(-3, -2)
