"""Policies: how many bits each token's keys and values are stored with, and what runs a model under one.

Here are the features that policies read, the rules, schedules and learned controllers, the driver that applies a policy
to a cache, and `CachedModel`, which reads texts through a cache; `saving` keeps what it read in files. How controllers
are trained is in `helpers.training`; how good policies are is measured in `helpers.evaluation`.
"""

from helpers.cache import Step
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.decoding import DecodeResult, decode
from helpers.policies.driver import PolicyDriver
from helpers.policies.features import TokenFeatures
from helpers.policies.learned import LearnedController, LearnedSchedule, LearnedWidths
from helpers.policies.policy import Policy
from helpers.policies.rarity import TokenCounts
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits
from helpers.policies.saving import load_cache, save_cache
from helpers.policies.schedules import (
    COMPACT_SCHEDULE,
    FINE_SCHEDULE,
    MIDDLE_SCHEDULE,
    QUALITY_SCHEDULE,
    SCHEDULES,
    AgeSchedule,
    Schedule,
)

__all__ = [
    "COMPACT_SCHEDULE",
    "FINE_SCHEDULE",
    "MIDDLE_SCHEDULE",
    "QUALITY_SCHEDULE",
    "SCHEDULES",
    "AgeSchedule",
    "CachedModel",
    "DecodeResult",
    "EntropyRule",
    "FixedBits",
    "LearnedController",
    "LearnedSchedule",
    "LearnedWidths",
    "Policy",
    "PolicyDriver",
    "RandomBits",
    "Schedule",
    "Step",
    "TokenCounts",
    "TokenFeatures",
    "decode",
    "load_cache",
    "save_cache",
    "score_blocks",
]
