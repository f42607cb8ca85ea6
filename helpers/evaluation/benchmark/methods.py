"""The caches that the benchmark measures, by the names that `--methods` takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from transformers import PreTrainedModel, StaticCache

from helpers.cache import Balance
from helpers.evaluation.methods import FullPrecision, Method, PackedMethod, StockQuantized
from helpers.io import ROOT
from helpers.policies import CachedModel, FixedBits, LearnedController, RandomBits, Step


@dataclass(frozen=True)
class BenchmarkMethod:
    """A way to store the cache and to attend to it, under the name and group that tables and figures give it."""

    name: str
    group: str
    method: Method
    attend: str = "dispatched"  # "reference": ours in plain PyTorch; "sdpa": no new token, only the attention
    static: bool = False  # StaticCache in place of what `method` opens

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return getattr(self.method, "installed", True)

    def open(self, model: PreTrainedModel, capacity: int) -> CachedModel:
        """`model` with an empty cache, with room for `capacity` tokens where room has to be given."""
        if self.static:
            return CachedModel(model, StaticCache(config=model.config, max_cache_len=capacity))
        return self.method.open(model)


@dataclass(frozen=True)
class BalancedMethod(BenchmarkMethod):
    """Static storage with balanced keys; the balance is random, as weights are here."""

    def open(self, model: PreTrainedModel, capacity: int) -> CachedModel:
        config = model.config
        balance = _random_balance(config.num_hidden_layers, config.num_key_value_heads, config.head_dim)
        return replace(self.method, balance=balance).open(model)


@lru_cache(maxsize=4)
def _random_balance(layers: int, heads: int, dim: int) -> Balance:
    noise = torch.randn(layers, heads, dim, dim, generator=torch.Generator().manual_seed(0)) / (4 * dim**0.5)
    return Balance(torch.eye(dim) + noise + noise.mT)


def _learned() -> BenchmarkMethod:
    """A schedule that has every token coded three times: more work than any that is compared in quality."""
    steps = Step(2, 4), Step(5, 2, keep=1 / 4)
    policy = LearnedController.load(ROOT / "data" / "controllers", "settle", 8, steps)
    return BenchmarkMethod("learned 8-4-2", "learned at settle", PackedMethod(policy))


def _static(bits: int) -> Callable[[], BenchmarkMethod]:
    return lambda: BenchmarkMethod(f"static {bits}-bit", "static", PackedMethod(FixedBits(bits)))


# What --methods names. The first is what every other is compared with.
METHODS: dict[str, Callable[[], BenchmarkMethod]] = {
    "dynamic": lambda: BenchmarkMethod("DynamicCache", "full precision", FullPrecision()),
    "static-cache": lambda: BenchmarkMethod("StaticCache", "full precision", FullPrecision(), static=True),
    "sdpa": lambda: BenchmarkMethod("SDPA alone", "full precision", FullPrecision(), "sdpa"),
    "2": _static(2),
    "4": _static(4),
    "8": _static(8),
    "16": _static(16),
    "mix": lambda: BenchmarkMethod("2/4/8/16 mix", "rule", PackedMethod(RandomBits())),
    "balanced": lambda: BalancedMethod("static 4-bit, balanced keys", "static", PackedMethod(FixedBits(4))),
    "learned": _learned,
    "reference": lambda: BenchmarkMethod(
        "static 4-bit (reference)", "static", PackedMethod(FixedBits(4)), attend="reference"
    ),
    "quanto": lambda: BenchmarkMethod("stock quanto 4-bit", "stock", StockQuantized("quanto")),
    "hqq": lambda: BenchmarkMethod("stock hqq 4-bit", "stock", StockQuantized("hqq")),
}
