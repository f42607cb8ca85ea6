"""Ways to store a cache, under one interface, so that every measurement treats all of them alike.

`Store` is this project's cache under a policy; `FullPrecision` is what transformers does by default; `StockQuantized`
is the library's own quantized cache, where its backend is installed (`pip install -e .[peers]`). Each opens a fresh
cache and, where there is a policy, its driver.
"""

import importlib.util
from dataclasses import dataclass

from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, QuantizedCache

from helpers.generation import PolicyDriver
from helpers.kv_cache import PackedKVCache
from helpers.memory import live_bytes as live_bytes
from helpers.memory import stored_bytes as stored_bytes
from helpers.policies import Policy, policy_for_text

BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class Store:
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


AnyStore = Store | FullPrecision | StockQuantized


def stock_stores() -> list[StockQuantized]:
    """The stock quantized caches whose backends are installed."""
    return [store for store in map(StockQuantized, BACKENDS) if store.installed]


def code_bits(cache: Cache) -> float:
    """Average width of the stored codes, full-precision tokens counted at 16; NaN where the cache does not tell."""
    if isinstance(cache, PackedKVCache):
        return cache.code_bits()
    return 16.0 if isinstance(cache, DynamicCache) and not isinstance(cache, QuantizedCache) else float("nan")
