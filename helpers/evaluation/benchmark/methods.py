"""The caches that the benchmark measures, by the names that `--methods` takes."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from helpers.evaluation.methods import FullPrecision, Method, PackedMethod, StockQuantized
from helpers.io.paths import ROOT
from helpers.policies.driver import PolicyDriver
from helpers.policies.learned import LearnedController
from helpers.policies.rules import FixedBits, RandomBits
from helpers.policies.schedules import QUALITY_SCHEDULE


@dataclass(frozen=True)
class BenchmarkMethod:
    """A way to store the cache and to attend to it, under the name that tables and figures give it."""

    name: str
    group: str  # of `plots.GROUP_STYLES`
    store: Method
    attend: str = "dispatched"  # "reference": ours in plain PyTorch; "sdpa": no new token, only the attention
    static: bool = False  # StaticCache in place of what `store` opens

    @property
    def installed(self) -> bool:
        """Whether what it needs is there."""
        return getattr(self.store, "installed", True)

    def open(self, model: PreTrainedModel, capacity: int) -> tuple[Cache, PolicyDriver | None]:
        """An empty cache, with room for `capacity` tokens where room has to be given, and its driver."""
        if self.static:
            return StaticCache(config=model.config, max_cache_len=capacity), None
        return self.store.open(model)


def _learned() -> PackedMethod:
    commit, steps = QUALITY_SCHEDULE
    return PackedMethod(LearnedController.load(ROOT / "data" / "controllers", "settle", commit, steps))


def _packed(bits: int, attend: str = "dispatched") -> Callable[[], BenchmarkMethod]:
    suffix = f" ({attend})" if attend != "dispatched" else ""
    return lambda: BenchmarkMethod(f"static {bits}-bit{suffix}", "static", PackedMethod(FixedBits(bits)), attend)


def _stock(backend: str) -> Callable[[], BenchmarkMethod]:
    return lambda: BenchmarkMethod(f"stock {backend} 4-bit", "stock", StockQuantized(backend))


# What --methods names. The first is what every other is compared with.
METHODS: dict[str, Callable[[], BenchmarkMethod]] = {
    "dynamic": lambda: BenchmarkMethod("DynamicCache", "full precision", FullPrecision()),
    "static-cache": lambda: BenchmarkMethod("StaticCache", "full precision", FullPrecision(), static=True),
    "sdpa": lambda: BenchmarkMethod("SDPA alone", "full precision", FullPrecision(), "sdpa"),
    "2": _packed(2),
    "4": _packed(4),
    "8": _packed(8),
    "16": _packed(16),
    "mix": lambda: BenchmarkMethod("2/4/8/16 mix", "rule", PackedMethod(RandomBits())),
    "learned": lambda: BenchmarkMethod("learned 8-4-2", "learned at settle", _learned()),
    "reference": _packed(4, "reference"),
    "quanto": _stock("quanto"),
    "hqq": _stock("hqq"),
}
