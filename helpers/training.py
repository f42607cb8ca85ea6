"""What the controller learns from, beyond Part 1's table: measured costs of widths, and what demotions did.

`measure_costs` extends the collected table by what each width costs each token; `settle_examples` replays texts under
a schedule and joins what was known of every token in every head with the damage that its demotion does.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from helpers.collection import model_fingerprint
from helpers.controller import (
    COMMIT_FEATURES,
    SCHEDULES,
    SEED_FEATURES,
    LossWeights,
    save_commit,
    settle_inputs,
    train_commit,
    train_settle,
    write_controller_card,
)
from helpers.features import TokenFeatures, surprisal
from helpers.files import atomic_path, provenance, write_json
from helpers.generation import PolicyDriver, score_blocks
from helpers.kv_cache import PackedKVCache
from helpers.packed_store import CENTRE_TOKENS, Demotion
from helpers.policies import AgeSchedule
from helpers.quantization import WIDTHS
from helpers.sensitivity import HORIZON, exact_costs, head_costs, optimal_bits, text_states

SETTLE_LABEL = "relative damage of a demotion in one head"
COST_COLUMNS = [f"cost_{bits}" for bits in WIDTHS]


def texts_of(table: pd.DataFrame) -> dict[int, list[int]]:
    """Token ids of each text of a collected table, by `text_id` (without its last token, which has no row)."""
    return {int(i): part["token_id"].tolist() for i, part in table.groupby("text_id", sort=False)}


@torch.no_grad()
def measure_costs(
    model: PreTrainedModel, table: pd.DataFrame, average: float = 4.0, horizon: int = HORIZON
) -> tuple[pd.DataFrame, float]:
    """The table of `collect` with more columns, and the lambda (nats per bit) behind `optimal_bits`.

    Added: `surprisal`, `key_error`, `value_error` (see `TokenFeatures`); `cost_2` to `cost_16`, the measured rise of
    KL in nats over the `horizon` following predictions; `horizon`, how many there were; and `optimal_bits` for a
    target `average`. Texts of fewer than 16 tokens are left out: nothing of them is ever packed.
    """
    parts = []
    for text_id, ids in tqdm(texts_of(table).items(), desc="costs", leave=False):
        if len(ids) < CENTRE_TOKENS:
            continue
        cache = DynamicCache(config=model.config)
        row = torch.tensor([ids], device=model.device)
        logits = model(input_ids=row, cache=cache).logits
        states = text_states(cache)
        own = torch.nn.functional.pad(surprisal(logits[:, :-1], row[:, 1:]), (1, 0))[0]
        errors = {
            f"{side}_error": states.store.relative_error(x, side, min(WIDTHS)).mean((0, 1, 2)).cpu().numpy()
            for side, x in (("key", states.keys), ("value", states.values))
        }
        costs = exact_costs(model, ids, range(len(ids)), WIDTHS, horizon)
        part = table[table["text_id"] == text_id].assign(surprisal=own.cpu().numpy(), **errors)
        part[COST_COLUMNS] = costs
        parts.append(part.assign(horizon=np.minimum(horizon, len(ids) - 1 - np.arange(len(ids)))))
    result = pd.concat(parts, ignore_index=True)
    bits, price = optimal_bits(result[COST_COLUMNS].to_numpy(), average)
    return result.assign(optimal_bits=bits), price


def load_or_measure_costs(
    model: PreTrainedModel, table: pd.DataFrame, path: str | Path, average: float = 4.0
) -> tuple[pd.DataFrame, float]:
    """`measure_costs`, kept in the CSV `path` (and `path`.json): measured again only for another model or table."""
    path = Path(path)
    content = [model_fingerprint(model), table["token_id"].tolist(), table["kv_bits"].tolist(), HORIZON]
    key = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    about = path.with_suffix(".json")
    if not path.is_file() or _key_in(about) != key:
        costs, price = measure_costs(model, table, average)
        about.unlink(missing_ok=True)  # or a run killed between the two files would leave new costs under an old key
        with atomic_path(path) as temporary:
            costs.to_csv(temporary, index=False, float_format="%.6g")
        write_json(about, {"key": key, "horizon": HORIZON, "average": average, "lambda": price, **provenance()})
    # From the file in any case: its numbers are rounded, and a run that is taken up again must end as a whole one.
    costs = pd.read_csv(path)
    bits, price = optimal_bits(costs[COST_COLUMNS].to_numpy(), average)
    return costs.assign(optimal_bits=bits), price


def _key_in(about: Path) -> str | None:
    """The key of the costs beside the file `about`; None where there is none, or no such file."""
    try:
        return json.loads(about.read_text(encoding="utf-8"))["key"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


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

    def scores(self, demotion: Demotion, features: TokenFeatures) -> torch.Tensor:
        self.seen.append(demotion)
        return super().scores(demotion, features)


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
            driver = PolicyDriver(model, cache, recorder)
            row = torch.tensor([list(ids)], device=model.device)
            for _ in score_blocks(model, row, cache, driver, block):
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


def commit_tasks(table: pd.DataFrame, price: float) -> dict[str, dict]:
    """Settings of `controller.train_commit` for the two tasks: "seed" copies the rule, "commit" learns `optimal_bits`.

    For the latter, cost and quality enter the loss in the proportion of `price`, the lambda of `measure_costs`.
    """
    cost_weight = max(WIDTHS) * price / table[COST_COLUMNS[0]].mean()
    return {
        "seed": {"features": SEED_FEATURES, "label": "kv_bits", "weights": LossWeights()},
        "commit": {"features": COMMIT_FEATURES, "label": "optimal_bits", "weights": LossWeights(1.0, cost_weight, 1.0)},
    }


def train_controllers(
    model: PreTrainedModel,
    table: pd.DataFrame,
    rows: Sequence[Sequence[int]],
    folder: str | Path,
    model_name: str,
    seed: int = 0,
    schedules: Sequence[AgeSchedule] = tuple(AgeSchedule(*schedule) for schedule in SCHEDULES),
) -> pd.DataFrame:
    """Train and save the three controllers of a model into `folder`; what notebook 02 does step by step.

    `table` is a result of `collection.collect`, `rows` are token ids of longer texts for the settle network. Returns
    the held-out loss and epoch of each.
    """
    costs, price = load_or_measure_costs(model, table, Path(folder) / "costs.csv")
    summary = []
    for name, task in commit_tasks(costs, price).items():
        network, history = train_commit(costs, **task, seed=seed)
        about = {"label": task["label"], "model": model_name, "weights": vars(task["weights"])}
        save_commit(network, folder, name, costs, about)
        summary.append({"controller": name, "epoch": history.best, "held-out loss": history.validation[history.best]})
    examples = settle_examples(model, rows, schedules, seed=seed)
    network, history = train_settle(examples.inputs, examples.damage, examples.text_ids, seed=seed)
    network.save(folder, "settle", {"label": SETTLE_LABEL, "model": model_name})
    summary.append({"controller": "settle", "epoch": history.best, "held-out loss": history.validation[history.best]})
    write_controller_card(folder)
    return pd.DataFrame(summary)
