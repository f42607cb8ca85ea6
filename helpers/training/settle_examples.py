"""What the settle network learns from: what was known of each token, and what its demotion did."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.store import Demotion
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.driver import PolicyDriver
from helpers.policies.learned import settle_inputs
from helpers.policies.schedules import AgeSchedule
from helpers.training.fisher import head_costs

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

    def demoted_damage(self, scores: torch.Tensor, keep: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Damage `[N]` of the tokens that are demoted when the `keep` of highest `scores` `[N, block]` stay."""
        kept = scores.topk(keep, dim=-1).indices
        rest = self.damage.sum(-1) - self.damage.gather(-1, kept).sum(-1)
        return rest.numpy() if rows is None else rest.numpy()[rows]


class _Recorder(AgeSchedule):
    """Follows its schedule, and notes what is known at each settle."""

    def scores(self, demotion: Demotion) -> torch.Tensor:
        self.seen.append(demotion)
        return super().scores(demotion)


def settle_examples(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    schedules: Sequence[AgeSchedule],
    block: int = 16,
    samples: int = 4,
    seed: int = 0,
) -> SettleExamples:
    """Replay `texts` under each of `schedules` and estimate what each demotion of its last step does.

    Damage is `sensitivity.head_costs`; blocks that no segment of predictions follows are left out. Raises
    `ValueError` where no text is long enough to have any.
    """
    columns: dict[str, list] = {name: [] for name in SettleExamples.__dataclass_fields__}
    moves = []
    for schedule in schedules:
        stages = [schedule.commit, *(step.bits for step in schedule.steps)]
        source, target = (bits if isinstance(bits, tuple) else (bits, bits) for bits in stages[-2:])
        moves.append((source, target, schedule.steps[-1].after))
    for text_id, ids in enumerate(tqdm(texts, desc="demotions", leave=False)):
        damages = head_costs(model, ids, moves, block, samples, seed=seed + text_id)
        for number, (schedule, damage) in enumerate(zip(schedules, damages)):
            recorder = _Recorder(schedule.commit, schedule.steps, "attention x error")
            object.__setattr__(recorder, "seen", [])
            cache = PackedKVCache(model.config, block=block)
            cached = CachedModel(model, cache, PolicyDriver(model, cache, recorder))
            row = torch.tensor([list(ids)], device=model.device)
            for _ in score_blocks(cached, row, block):
                pass
            for seen in recorder.seen:
                stop = seen.start + seen.key_error.shape[-1]
                by_block = torch.tensor(damage[:, :, seen.start : stop]).unflatten(-1, (-1, block)).flatten(0, 2)
                known = ~by_block.isnan().any(-1)

                def rows(x: torch.Tensor, known=known) -> torch.Tensor:
                    """`[L, 1, H, slots, ...]` as `[blocks, block, ...]`, those of known damage."""
                    return x[:, 0].cpu().unflatten(2, (-1, block)).flatten(0, 2)[known]

                columns["inputs"].append(rows(settle_inputs(seen)))
                columns["damage"].append(by_block[known])
                columns["by_attention"].append(rows(seen.received))
                columns["by_attention_and_error"].append(rows(seen.received * (seen.key_error + seen.value_error)))
                columns["text_ids"].append(np.full(int(known.sum()), text_id))
                columns["schedule"].append(np.full(int(known.sum()), number))
    if not sum(map(len, columns["text_ids"])):
        raise ValueError("no text is long enough for a settled block to be followed by predictions")
    return SettleExamples(
        **{
            name: np.concatenate(parts) if name in ("text_ids", "schedule") else torch.cat(parts)
            for name, parts in columns.items()
        }
    )
