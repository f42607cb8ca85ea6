"""Ways to store a cache, under one interface, so that every measurement treats all of them alike.

`PackedMethod` is this project's cache under a policy; `FullPrecision` is what transformers does by default;
`StockQuantized` is the library's own quantized cache, where its backend is installed. Each opens a `CachedModel` on
an empty cache. Tables and figures arrange methods by `Group`.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel
from transformers.cache_utils import QuantizedCache

from helpers.cache import Balance, PackedKVCache
from helpers.cache.arguments import head_dim
from helpers.evaluation.kivi import KiviCache
from helpers.policies import CachedModel, EntropyRule, FixedBits, LearnedController, Policy, PolicyDriver, Step
from helpers.policies.schedules import COMPACT_SCHEDULE, RANKINGS, SCHEDULES, AgeSchedule

PolicyName = Literal["rule", "imitation", "commit", "settle", "compact"]
BACKENDS = {"quanto": "optimum.quanto", "hqq": "hqq"}


@dataclass(frozen=True)
class PackedMethod:
    """The packed cache under a policy, with a block and a quantizer."""

    policy: Policy
    block: int = 16
    quantizer: str = "rotated"
    sinks: int = 4
    centre: str = "rotary"
    balance: Balance | Literal["model"] | None = "model"
    stretch: bool = True

    @property
    def name(self) -> str:
        block = "" if self.block == 16 else f", block {self.block}"
        return f"{self.policy.name}{block}{self.coding}"

    @property
    def coding(self) -> str:
        """What is not as usual in how tokens are coded, after a comma."""
        parts = {
            "sinks": self.sinks > 0,
            "rotary mean": self.centre == "rotary",
            "balance": self.balance is not None,
            "stretch": self.stretch,
        }
        lacking = [part for part, there in parts.items() if not there]
        return ", plain min-max" * (self.quantizer == "minmax") + f", no {', no '.join(lacking)}" * bool(lacking)

    def open(self, model: PreTrainedModel, text: int = 0) -> CachedModel:
        """`model` with an empty cache and the driver that commits to it; `text` seeds random policies."""
        coding = self.sinks, self.centre, self.balance, self.stretch
        cache = PackedKVCache(model.config, None, self.block, self.quantizer, None, *coding)
        return CachedModel(model, cache, PolicyDriver(model, cache, self.policy.for_text(text)))


@dataclass(frozen=True)
class FullPrecision:
    """Keys and values as the model computes them."""

    name: str = "full precision"
    block: int = 16

    def open(self, model: PreTrainedModel, text: int = 0) -> CachedModel:
        """`model` with an empty cache of the library's."""
        return CachedModel(model)


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
        """Whether the backend is there."""
        try:
            return importlib.util.find_spec(BACKENDS[self.backend]) is not None
        except ModuleNotFoundError:
            return False

    def open(self, model: PreTrainedModel, text: int = 0) -> CachedModel:
        """`model` with an empty quantized cache."""
        axes = {"axis_key": 1, "axis_value": 1} if self.backend == "hqq" else {}
        config = model.config.get_text_config(decoder=True)
        group = min(64, head_dim(config))
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        if self.backend == "hqq" and heads * head_dim(config) // group % 2:
            group //= 2  # it packs two groups into a byte, and cannot where a token has an odd number of them
        cache = QuantizedCache(
            self.backend, config, nbits=self.bits, q_group_size=group, residual_length=self.residual, **axes
        )
        return CachedModel(model, cache)


@dataclass(frozen=True)
class Kivi:
    """KIVI's scheme: keys by channel, values by token, the newest `residual` tokens in full precision."""

    bits: int = 4
    residual: int = 128
    block: int = 16  # of the texts that are fed to it

    @property
    def name(self) -> str:
        return f"KIVI's scheme {self.bits}-bit, residual {self.residual}"

    def open(self, model: PreTrainedModel, text: int = 0) -> CachedModel:
        """`model` with an empty cache of this kind."""
        config = model.config.get_text_config(decoder=True)
        return CachedModel(model, KiviCache(config, head_dim(config), self.bits, self.residual))


Method = PackedMethod | FullPrecision | StockQuantized | Kivi


@dataclass(frozen=True)
class Group:
    """Methods of one kind, under the name that tables and the colours of figures give the kind."""

    name: str
    methods: Sequence[Method]
    chooses_endings: bool = True  # takes part in multiple choice
    random_control: bool = False  # each method is followed by widths drawn at random with the same histogram


def stock_methods() -> list[StockQuantized]:
    """The stock quantized caches whose backends are installed."""
    return [method for method in map(StockQuantized, BACKENDS) if method.installed]


def _others() -> list[StockQuantized | Kivi]:
    """What others do, also with few tokens in full precision: 128 of them outweigh the rest of a text of hundreds."""
    kivi = [Kivi(bits, residual) for bits in (4, 2) for residual in (128, 32)]
    return [*(replace(each, residual=16) for each in stock_methods()), *kivi]


def _packed(*policies: Policy) -> list[PackedMethod]:
    return [PackedMethod(policy) for policy in policies]


def _settled(controllers: str | Path) -> list[PackedMethod]:
    """The settle controller under each of the schedules that rankings are compared on."""
    return _packed(*(LearnedController.load(controllers, "settle", *schedule) for schedule in SCHEDULES))


def seven_methods(controllers: str | Path) -> list[Group]:
    """What answers the assignment's question: full precision, static 4-bit storage (ours and the library's), the rule,
    the controller that imitates it, the settled one, and its schedule with tokens drawn at random.
    """
    imitation = LearnedController.load(controllers, "imitation")
    settle = LearnedController.load(controllers, "settle")
    control = AgeSchedule(settle.commit, settle.steps, "random")
    return [
        Group("full precision", [FullPrecision()]),
        Group("static", _packed(FixedBits(4))),
        Group("rule", _packed(EntropyRule.load(controllers))),
        Group("learned at commit", _packed(imitation)),
        Group("learned at settle", _packed(settle)),
        Group("schedule", _packed(control)),
        Group("stock", stock_methods()[:1]),
    ]


def chosen_methods(bits: Sequence[int], policies: Sequence[PolicyName], controllers: str | Path) -> list[PackedMethod]:
    """Fixed widths and policies as a command line names them; "compact" is the settle controller on that schedule."""
    methods = _packed(*map(FixedBits, bits))
    for name in policies:
        if name == "rule":
            policy = EntropyRule.load(controllers)
        elif name == "compact":
            policy = LearnedController.load(controllers, "settle", *COMPACT_SCHEDULE)
        else:
            policy = LearnedController.load(controllers, name)
        methods += _packed(policy.at_average(4.0) if name == "commit" else policy)
    return methods


def multiple_choice_methods(controllers: str | Path) -> list[Group]:
    """What is worth the hours that hundreds of multiple-choice items take on a large model."""
    imitation = LearnedController.load(controllers, "imitation")
    return [
        Group("full precision", [FullPrecision()]),
        Group("static", _packed(FixedBits(4))),
        Group("rule", _packed(EntropyRule.load(controllers)), random_control=True),
        Group("learned at commit", _packed(imitation), random_control=True),
        Group("learned at settle", _packed(LearnedController.load(controllers, "settle"))),
    ]


def coding_methods() -> list[Group]:
    """Static storage at 4 and 2 bits: rotated alone, then with each part of the coding added."""
    off = {"sinks": 0, "centre": "none", "balance": None, "stretch": False}
    added = [dict(list(off.items())[count:]) for count in range(len(off) + 1)]
    static = [PackedMethod(FixedBits(bits), **part) for bits in (4, 2) for part in added]
    return [Group("full precision", [FullPrecision()]), Group("static", static)]


def default_methods(controllers: str | Path) -> list[Group]:
    """All methods of the comparison, the learned ones read from the folder `controllers`.

    All schedules but one sit out the multiple choice: its contexts are a few blocks long, and hardly anything in them
    grows old enough to move.
    """
    settled = _settled(controllers)
    imitation, commit = (LearnedController.load(controllers, name) for name in ("imitation", "commit"))
    ranked = [AgeSchedule(*schedule, ranking) for schedule in SCHEDULES for ranking in RANKINGS]
    widths = _packed(*map(FixedBits, (8, 4, 2)))
    plain = [replace(method, quantizer="minmax") for method in widths[1:]]
    simple = AgeSchedule(8, (Step(3, 4),)), AgeSchedule(4, (Step(8, (4, 2)),)), AgeSchedule(4, (Step(8, 2),))
    return [
        Group("full precision", [FullPrecision()]),
        Group("static", [*widths, *plain]),
        Group("rule", _packed(EntropyRule.load(controllers)), random_control=True),
        Group("schedule", _packed(*simple, *ranked), chooses_endings=False),
        Group("learned at commit", _packed(imitation, commit.at_average(4.0)), random_control=True),
        Group("learned at settle", settled[:2], chooses_endings=False),
        Group("learned at settle", settled[2:3]),
        Group("learned at settle", settled[3:], chooses_endings=False),
        Group("stock", stock_methods()),
        Group("stock", _others(), chooses_endings=False),
    ]
