"""Ways to store a cache, under one interface, so that every measurement treats all of them alike.

`Store` is this project's cache under a policy; `FullPrecision` is what transformers does by default; `StockQuantized`
is the library's own quantized cache, where its backend is installed (`pip install -e .[peers]`). Each opens a fresh
cache and, where there is a policy, its driver.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

from helpers.cache.kv_cache import PackedKVCache
from helpers.policies.driver import PolicyDriver
from helpers.policies.learned import LearnedController
from helpers.policies.policy import Policy, Step, policy_for_text
from helpers.policies.rules import EntropyRule, FixedBits
from helpers.policies.schedules import SCHEDULES, AgeSchedule

BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class PackedMethod:
    """The packed cache under a policy, with a block and a quantizer."""

    policy: Policy
    block: int = 16
    quantizer: str = "rotated"

    @property
    def name(self) -> str:
        plain = ", plain min-max" if self.quantizer == "minmax" else ""
        block = "" if self.block == 16 else f", block {self.block}"
        return f"{self.policy.name}{block}{plain}"

    def open(self, model: PreTrainedModel, text: int = 0) -> tuple[Cache, PolicyDriver | None]:
        """An empty cache for `model` and the driver that commits to it; `text` seeds random policies."""
        cache = PackedKVCache(model.config, block=self.block, quantizer=self.quantizer)
        return cache, PolicyDriver(model, cache, policy_for_text(self.policy, text))


@dataclass(frozen=True)
class FullPrecision:
    """Keys and values as the model computes them."""

    name: str = "full precision"
    block: int = 16

    def open(self, model: PreTrainedModel, text: int = 0) -> tuple[Cache, PolicyDriver | None]:
        return DynamicCache(config=model.config), None


@dataclass(frozen=True)
class StockQuantized:
    """The library's quantized cache: one width, the newest `residual` tokens in full precision."""

    backend: str
    bits: int = 4
    residual: int = 128
    block: int = 16  # of the texts that are fed to it

    @property
    def name(self) -> str:
        return f"stock {self.backend} {self.bits}-bit, residual {self.residual}"

    @property
    def installed(self) -> bool:
        package = BACKENDS[self.backend]
        try:
            return importlib.util.find_spec(package) is not None
        except ModuleNotFoundError:
            return False

    def open(self, model: PreTrainedModel, text: int = 0) -> tuple[Cache, PolicyDriver | None]:
        options = {"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {}
        config = model.config.get_text_config(decoder=True)
        group = min(64, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        cache = QuantizedCache(
            self.backend, config, nbits=self.bits, q_group_size=group, residual_length=self.residual, **options
        )
        return cache, None


Method = PackedMethod | FullPrecision | StockQuantized


def stock_methods() -> list[StockQuantized]:
    """The stock quantized caches whose backends are installed."""
    return [store for store in map(StockQuantized, BACKENDS) if store.installed]


def default_methods(controllers: str | Path) -> dict[str, list[Method]]:
    """Group of each store -> stores, the controllers read from the folder `controllers`.

    Random controls that match the histogram of another policy are added by `compare`, which measures it.
    """
    simple = [AgeSchedule(4, (Step(3, 2),)), AgeSchedule(8, (Step(3, 4), Step(6, 2)))]
    ranked = [
        AgeSchedule(commit, steps, ranking)
        for commit, steps in SCHEDULES
        for ranking in ("random", "attention", "attention x error")
    ]
    return {
        "full precision": [FullPrecision()],
        "static": [PackedMethod(FixedBits(bits), quantizer=q) for bits in (8, 4, 2) for q in ("rotated", "minmax")],
        "rule": [PackedMethod(EntropyRule())],
        "schedule": [PackedMethod(policy) for policy in (*simple, *ranked)],
        "learned at commit": [
            PackedMethod(LearnedController.load(controllers, "seed")),
            PackedMethod(LearnedController.load(controllers, "commit", average=4.0)),
        ],
        "learned at settle": [
            PackedMethod(LearnedController.load(controllers, "settle", commit, steps)) for commit, steps in SCHEDULES
        ],
        "stock": list(stock_methods()),
    }
