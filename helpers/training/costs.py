"""Part 1's table extended by what each width costs each token, and by the width that is worth its bits.

Measuring takes minutes on a small model and hours on a large one, whose costs are estimated instead (`fisher`). They
are kept in a file, for the model and table that they belong to.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel

from helpers.cache import WIDTHS
from helpers.cache.centre import CENTRE_TOKENS
from helpers.io import provenance, read_keyed, write_keyed, write_table
from helpers.models import fingerprint
from helpers.policies.features import log_probabilities, surprisal_of
from helpers.training.allocation import optimal_bits
from helpers.training.exact import HORIZON, exact_costs
from helpers.training.fisher import fisher_costs
from helpers.training.states import text_states

MOST_WEIGHTS = 20_000_000  # of a model whose costs are measured
COST_COLUMNS = [f"cost_{bits}" for bits in WIDTHS]


def texts_of(table: pd.DataFrame) -> dict[int, list[int]]:
    """Token ids of each text of a collected table, by `text_id` (without its last token, which has no row)."""
    return {int(i): part["token_id"].tolist() for i, part in table.groupby("text_id", sort=False)}


@torch.no_grad()
def measure_costs(
    model: PreTrainedModel,
    table: pd.DataFrame,
    average: float = 4.0,
    horizon: int = HORIZON,
    exact: bool = True,
    seed: int = 0,
) -> tuple[pd.DataFrame, float]:
    """The table of `collect` with more columns, and the multiplier (nats per bit) behind `optimal_bits`.

    Added: `surprisal`, `key_error`, `value_error` (see `TokenFeatures`); `cost_2` to `cost_16`, the rise of
    KL in nats over the `horizon` following predictions, measured or, unless `exact`, estimated; `horizon`, how many
    there were; and `optimal_bits` for a target `average`. Texts of fewer than 16 tokens are left out: nothing of them
    is ever packed.
    """
    parts = []
    for text_id, ids in tqdm(texts_of(table).items(), desc="costs", leave=False):
        if len(ids) < CENTRE_TOKENS:
            continue
        cache = DynamicCache(config=model.config)
        row = torch.tensor([ids], device=model.device)
        logits = model(input_ids=row, cache=cache).logits
        states = text_states(cache, model.config)
        own = torch.nn.functional.pad(surprisal_of(log_probabilities(logits[:, :-1]), row[:, 1:]), (1, 0))[0]
        key_error, value_error = (x.mean((0, 1, 2)) for x in states.relative_errors(min(WIDTHS)))
        known = {"surprisal": own, "key_error": key_error, "value_error": value_error}
        part = table[table["text_id"] == text_id].assign(**{name: x.cpu().numpy() for name, x in known.items()})
        if exact:
            part[COST_COLUMNS] = exact_costs(model, ids, range(len(ids)), WIDTHS, horizon)
        else:
            part[COST_COLUMNS] = fisher_costs(model, ids, WIDTHS, horizon, seed=seed + int(text_id))
        parts.append(part.assign(horizon=np.minimum(horizon, len(ids) - 1 - np.arange(len(ids)))))
    result = pd.concat(parts, ignore_index=True)
    bits, multiplier = optimal_bits(result[COST_COLUMNS].to_numpy(), average)
    return result.assign(optimal_bits=bits), multiplier


def load_or_measure_costs(
    model: PreTrainedModel, table: pd.DataFrame, path: str | Path, average: float = 4.0, exact: bool | None = None
) -> tuple[pd.DataFrame, float]:
    """`measure_costs`, kept in the CSV `path` (and `path`.json): measured again only for another model or table.

    `exact` says whether they are measured or estimated, by default that models up to `MOST_WEIGHTS` are measured;
    `path`.json has it as `costs`.
    """
    if exact is None:
        exact = sum(p.numel() for p in model.parameters()) <= MOST_WEIGHTS
    path, about = Path(path), Path(path).with_suffix(".json")
    key = [fingerprint(model), table["token_id"].tolist(), table["kv_bits"].tolist(), HORIZON, exact]
    if not path.is_file() or read_keyed(about, key) is None:
        costs, multiplier = measure_costs(model, table, average, exact=exact)
        about.unlink(missing_ok=True)  # or a run killed between the two files would leave new costs under an old key
        write_table(path, costs)
        how = "measured" if exact else "estimated (Fisher information)"
        entries = {"costs": how, "horizon": HORIZON, "average": average, "lambda": multiplier, **provenance()}
        write_keyed(about, key, entries)
    # From the file in any case: its numbers are rounded, and a run that is taken up again must end as a whole one.
    costs = pd.read_csv(path)
    bits, multiplier = optimal_bits(costs[COST_COLUMNS].to_numpy(), average)
    return costs.assign(optimal_bits=bits), multiplier
