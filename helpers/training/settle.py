"""The network that ranks the tokens of a block when the block settles: what it learns from, and its training.

It learns, from what is known of each token when its block settles, what the token's demotion does. Demotion: the token
moves to the last, lowest width of a schedule, in one head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.cache import Demotion, PackedKVCache
from helpers.cache.quantization import width_pair
from helpers.policies import AgeSchedule, CachedModel, PolicyDriver, score_blocks
from helpers.policies.learned import SETTLE_FEATURES, settle_inputs
from helpers.policies.network import Network
from helpers.training.fisher import head_costs
from helpers.training.fitting import History, fit_network, split_texts

SETTLE_LABEL = "relative damage of a demotion in one head"


@dataclass
class SettleExamples:
    """One row a block in one head: `inputs` `[N, block, features]`, `damage` (nats) and others `[N, block]`."""

    inputs: torch.Tensor
    damage: torch.Tensor
    by_attention: torch.Tensor  # the hand-made scores, to compare with
    by_attention_and_error: torch.Tensor
    text_ids: np.ndarray  # [N]
    schedule: np.ndarray  # [N], index into the schedules

    def demoted_damage(self, scores: torch.Tensor, keep: int) -> np.ndarray:
        """Damage `[N]` of the tokens that are demoted when the `keep` of highest `scores` `[N, block]` stay."""
        kept = scores.topk(keep, dim=-1).indices
        return (self.damage.sum(-1) - self.damage.gather(-1, kept).sum(-1)).numpy()


@dataclass(frozen=True)
class _Recorder(AgeSchedule):
    """Follows its schedule, and notes what is known at each settle."""

    seen: list[Demotion] = field(default_factory=list, compare=False)

    def scores(self, demotion: Demotion) -> torch.Tensor:
        self.seen.append(demotion)
        return super().scores(demotion)


def _by_block(x: torch.Tensor, block: int) -> torch.Tensor:
    """`[L, 1, H, slots, ...]` as one row a block in one head, `[blocks, block, ...]`."""
    return x[:, 0].cpu().unflatten(2, (-1, block)).flatten(0, 2)


def settle_examples(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    schedules: Sequence[AgeSchedule],
    block: int = 16,
    samples: int = 4,
    seed: int = 0,
) -> SettleExamples:
    """Replay `texts` under each of `schedules` and estimate what each demotion of its last step does.

    Damage is `head_costs`; blocks that no segment of predictions follows, or that sinks shorten, are left out. Raises
    `ValueError` where no text is long enough to have any.
    """
    columns: dict[str, list] = {each.name: [] for each in fields(SettleExamples)}
    moves = []
    for schedule in schedules:
        stages = [schedule.commit, *(step.bits for step in schedule.steps)]
        moves.append((*map(width_pair, stages[-2:]), schedule.steps[-1].after))
    for text_id, ids in enumerate(tqdm(texts, desc="demotions", leave=False)):
        row = torch.tensor([list(ids)], device=model.device)
        damages = head_costs(model, ids, moves, block, samples, seed=seed + text_id)
        for number, (schedule, damage) in enumerate(zip(schedules, damages)):
            recorder = _Recorder(schedule.commit, schedule.steps, "attention x error")
            cache = PackedKVCache(model.config, block=block)
            for _ in score_blocks(CachedModel(model, cache, PolicyDriver(model, cache, recorder)), row, block):
                pass
            for seen in recorder.seen:
                if seen.block != block:  # what sinks leave of theirs
                    continue
                stop = seen.start + seen.key_error.shape[-1]
                damage_there = _by_block(torch.tensor(damage[:, None, :, seen.start : stop]), block)
                known = ~damage_there.isnan().any(-1)
                by_attention = _by_block(seen.received, block)
                error = _by_block(seen.key_error + seen.value_error, block)
                for name, rows in {
                    "inputs": _by_block(settle_inputs(seen), block),
                    "damage": damage_there,
                    "by_attention": by_attention,
                    "by_attention_and_error": by_attention * error,
                    "text_ids": torch.full(known.shape, text_id),
                    "schedule": torch.full(known.shape, number),
                }.items():
                    columns[name].append(rows[known])
    if not sum(map(len, columns["text_ids"])):
        raise ValueError("no text is long enough for a settled block to be followed by predictions")
    joined = {name: torch.cat(parts) for name, parts in columns.items()}
    return SettleExamples(**joined | {name: joined[name].numpy() for name in ("text_ids", "schedule")})


def settle_loss(outputs: torch.Tensor, damage: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of `damage` `[...]` under an exponential law of mean `exp(outputs)` `[..., 1]`.

    The damage of one token in one head is estimated from few draws, so its noise is multiplicative; this loss is
    least where the outputs are the logarithm of the expected damage.
    """
    score = outputs[..., 0]
    return (damage * (-score).clamp(max=15).exp() + score).mean()


def train_settle(
    inputs: torch.Tensor,
    damage: torch.Tensor,
    text_ids: np.ndarray,
    hidden: Sequence[int] = (64, 64),
    seed: int = 0,
    epochs: int = 30,
    patience: int = 4,
    validation: float = 0.2,
) -> tuple[Network, History]:
    """Train a network that ranks the tokens of a block in one head by the damage that demoting them does.

    `inputs` `[blocks, block, features]` from `settle_inputs`, `damage` `[blocks, block]` from
    `head_costs`, `text_ids` `[blocks]`. Damage is taken relative to its block's mean: what counts is the
    order within a block.
    """
    relative = (damage / damage.mean(-1, keepdim=True).clamp(min=1e-30)).float()
    held = torch.tensor(split_texts(text_ids, validation, seed))
    parts = [(inputs[rows], relative[rows]) for rows in (~held, held)]
    torch.manual_seed(seed)
    network = Network.create(SETTLE_FEATURES, parts[0][0].flatten(0, 1), hidden, 1)
    return network, fit_network(network, settle_loss, *parts, epochs, patience, batch=128, rate=2e-3)
