"""The learned controller: small networks that choose widths at commit and rank tokens at settle.

`CommitNet` maps a token's features to probabilities of 2, 4, 8 and 16 bits; `SettleNet` maps what is known of a token
in one head when its block settles to the damage that demoting it would do. Both are MLPs with standardised inputs.
`LearnedController` is the policy made of them. Weights are safetensors, everything else JSON.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from helpers.cache.quantization import WIDTHS, Widths
from helpers.cache.store import Demotion
from helpers.policies.features import TokenFeatures
from helpers.policies.network import Network
from helpers.policies.policy import Policy, Step
from helpers.policies.rarity import TokenCounts
from helpers.policies.schedules import QUALITY_SCHEDULE, check_steps, describe_kept, describe_schedule

IMITATION_FEATURES = ("entropy", "rarity", "attn_var")


COMMIT_FEATURES = (*IMITATION_FEATURES, "confidence", "surprisal", "key_error", "value_error")


SETTLE_FEATURES = ("received", "key_error", "value_error", "key_error_size", "value_error_size", "place")


def widths_at_price(log_probabilities: torch.Tensor, price: float) -> torch.Tensor:
    """Width of the highest `log p - price * bits`; `[..., 4]` gives integer `[...]`. Price 0 is the likeliest."""
    bits = torch.tensor(WIDTHS, device=log_probabilities.device)
    return bits[(log_probabilities - price * bits).argmax(-1)]


def settle_inputs(demotion: Demotion) -> torch.Tensor:
    """Features of the tokens of settling blocks for `SettleNet`, `[L, B, H, slots, features]`, no logits needed.

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


@dataclass
class LearnedController(Policy):
    """Policy of a commit network, or of a schedule and a settle network.

    With `steps` blocks are committed at `commit` and move on with age as in `AgeSchedule`, the settle network
    choosing what each head keeps. Without, the commit network gives each token its width; `price` (per bit, in units
    of log-probability) moves the average, see `at_average`. The two exclude each other, since only blocks of one
    width can be settled. Raises `ValueError` for a combination that has no meaning.
    """

    commit_net: Network | None = None
    settle_net: Network | None = None
    commit: Widths = 8
    steps: tuple[Step, ...] = ()
    price: float = 0.0
    rates: dict[float, float] = field(default_factory=dict)  # average bits on the training texts -> price
    label: str = "learned"
    start_counts: TokenCounts | None = None

    def __post_init__(self):
        if self.steps:
            check_steps(self.steps)
            if self.commit_net is not None:
                raise ValueError(
                    "a commit network and steps exclude each other: it gives the tokens of a block several widths, and "
                    "only blocks of one width can be settled"
                )
            if self.settle_net is None and self.steps[-1].keep:
                raise ValueError("steps that keep tokens need a settle network")
        elif self.commit_net is None:
            raise ValueError("a LearnedController needs a commit network, or steps with a settle network")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        name: str = "settle",
        commit: Widths = 8,
        steps: tuple[Step, ...] | None = None,
        average: float | None = None,
    ) -> "LearnedController":
        """The controller `name` in `folder`: "settle" (with the default steps unless given), "commit" or "seed".

        `average` asks a commit network for that average width (as on its training texts).
        """
        if name == "settle":
            net, _ = Network.load(folder, name, SETTLE_FEATURES, 1)
            return cls(settle_net=net, commit=commit, steps=QUALITY_SCHEDULE[1] if steps is None else steps)
        net, about = Network.load(folder, name, tuple(TokenFeatures.__dataclass_fields__), len(WIDTHS))
        try:
            rates = {float(rate): float(price) for rate, price in about.get("rates", {}).items()}
            numbers = {int(token): int(count) for token, count in about.get("token_counts", {}).items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"controller {name}: its rates or token counts are no numbers ({error})") from error
        if not np.isfinite([*rates, *rates.values()]).all() or min(numbers.values(), default=0) < 0:
            raise ValueError(f"controller {name}: its rates must be finite and its token counts 0 or more")
        counts = TokenCounts(numbers)
        controller = cls(commit_net=net, rates=rates, label=f"learned, {name}", start_counts=counts)
        return controller if average is None else controller.at_average(average)

    def at_average(self, average: float) -> "LearnedController":
        """A copy whose commit widths have this average on the training texts (interpolated between known rates)."""
        known = sorted(self.rates)
        if not known or not known[0] <= average <= known[-1]:
            span = f"{known[0]} and {known[-1]}" if known else "no known rates"
            raise ValueError(f"average must lie between {span} bits, got {average}")
        price = float(np.interp(average, known, [self.rates[rate] for rate in known]))
        return LearnedController(**{**_shallow(self), "price": price, "label": f"{self.label} at {average:g} bits"})

    @property
    def name(self) -> str:
        if not self.steps:
            return self.label
        return f"{describe_schedule(self.commit, self.steps)}, {describe_kept(self.steps)} by learned score"

    @property
    def needs(self) -> tuple[str, ...]:
        return self.commit_net.features if self.commit_net else ()

    @property
    def needs_received(self) -> bool:
        return bool(self.steps and self.steps[-1].keep)

    @torch.no_grad()
    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor | Widths:
        if self.steps:
            return self.commit
        inputs = torch.stack([getattr(features, name) for name in self.commit_net.features], dim=-1)
        self.commit_net = self.commit_net.to(inputs.device)
        return widths_at_price(self.commit_net(inputs.float()).log_softmax(-1), self.price)

    @torch.no_grad()
    def scores(self, demotion: Demotion, features: TokenFeatures) -> torch.Tensor:
        self.settle_net = self.settle_net.to(demotion.key_error.device)
        return self.settle_net(settle_inputs(demotion))[..., 0]


def _shallow(controller: LearnedController) -> dict:
    return {name: getattr(controller, name) for name in controller.__dataclass_fields__}
