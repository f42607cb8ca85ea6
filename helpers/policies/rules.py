"""Policies that decide at commit by a rule: fixed widths, the entropy rule, and the random control."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from helpers.cache.plan import Plan
from helpers.cache.quantization import WIDTHS, check_width
from helpers.io import provenance, relative_to_root, write_json
from helpers.policies.features import TokenFeatures
from helpers.policies.policy import Policy

RULE = "rule.json"  # its file, beside the controllers


@dataclass(frozen=True)
class FixedBits(Policy):
    """Every token at the same width."""

    bits: int

    def __post_init__(self):
        check_width(self.bits)

    @property
    def name(self) -> str:
        return f"static {self.bits}-bit"

    @property
    def plan(self) -> Plan:
        return Plan(self.bits)

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> int:
        return self.bits


@dataclass(frozen=True)
class EntropyRule(Policy):
    """The rule-based dynamic policy: the less certain the model, the wider the token.

    Entropy (nats) below the first threshold gives 2 bits, then 4, 8 and, from the last threshold on, 16. The default
    thresholds are the assignment's; `training.calibrate_rule` finds a model's own, and `load` reads them.
    """

    thresholds: tuple[float, float, float] = (2.0, 4.0, 6.0)
    needs: tuple[str, ...] = ("entropy",)
    name: str = "rule-based dynamic"

    def __post_init__(self):
        if len(self.thresholds) != 3 or not all(
            a < b for a, b in zip(self.thresholds, self.thresholds[1:], strict=False)
        ):
            raise ValueError(f"thresholds must be three rising entropies in nats, got {self.thresholds}")

    @staticmethod
    def load(folder: str | Path) -> "EntropyRule":
        """The rule that `save` wrote beside the controllers in `folder`.

        Raises `FileNotFoundError` where there is none, and `ValueError` for a file that holds no thresholds.
        """
        path = Path(folder) / RULE
        if not path.is_file():
            raise FileNotFoundError(f"there is no {RULE} in {folder}: notebook 01 or python main.py collect writes one")
        try:
            return EntropyRule(tuple(map(float, json.loads(path.read_text(encoding="utf-8"))["thresholds"])))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{relative_to_root(path)} holds no thresholds of a rule ({error})") from error

    def save(self, folder: str | Path, about: dict[str, object]) -> Path:
        """Write the thresholds with `about` and provenance beside the controllers in `folder`."""
        path = Path(folder) / RULE
        write_json(path, {"thresholds": self.thresholds, **about, **provenance()})
        return path

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor:
        entropy = features.entropy
        edges = torch.tensor(self.thresholds, dtype=entropy.dtype, device=entropy.device)
        return torch.tensor(WIDTHS, device=entropy.device)[torch.bucketize(entropy.contiguous(), edges, right=True)]


@dataclass
class RandomBits(Policy):
    """Control: widths drawn at random with given shares of 2, 4, 8 and 16 bits, blind to the token."""

    shares: tuple[float, float, float, float] = (0.25, 0.25, 0.25, 0.25)
    seed: int = 0
    text: int = 0
    name: str = "random"
    _draws: int = field(default=0, init=False, repr=False)

    def __post_init__(self):
        if len(self.shares) != 4 or min(self.shares) < 0 or not abs(sum(self.shares) - 1) <= 1e-6:
            raise ValueError(f"shares must be four non-negative numbers that sum to 1, got {self.shares}")

    def for_text(self, text: int) -> "RandomBits":
        """A copy whose draws belong to text number `text`, whatever was drawn before."""
        return replace(self, text=text)

    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor:
        generator = np.random.default_rng((self.seed, self.text, self._draws))
        self._draws += 1
        return torch.from_numpy(
            generator.choice(WIDTHS, size=(batch, tokens), p=np.divide(self.shares, sum(self.shares)))
        )
