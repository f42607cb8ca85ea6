"""Part 1: run a model over texts under a policy and log, token by token, what a controller could learn from.

    python main.py collect --model MODEL --texts HELLASWAG.jsonl

The table's first six columns are `entropy, rarity, attn_var, kv_bits, latency, accuracy`; no text is stored.
Collection goes text by text into a partial file beside the result, which a later run with the same settings takes
up again; the result itself appears only when it is complete and has passed `check_training_data`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from helpers.cache import PackedKVCache
from helpers.io.atomic import atomic_path, explain_full_disk
from helpers.io.processes import from_main, is_main_process, process_count, spread
from helpers.io.results import key_hash, write_table
from helpers.models import check_context, fingerprint
from helpers.policies import CachedModel, Policy, PolicyDriver, TokenCounts, decode
from helpers.training.table import COLUMNS, check_training_data

TEXTS_A_ROUND = 4  # of each of several processes, between two gatherings: enough to even out texts of unequal length


def _read(model: PreTrainedModel, ids: Sequence[int], text_id: int, policy: Policy, block: int):
    """The driver and the result of reading one text token by token through a packed cache under `policy`."""
    cache = PackedKVCache(model.config, block=block)
    driver = PolicyDriver(model, cache, policy.for_text(text_id), extra=("entropy", "confidence", "attn_var"))
    ids = torch.tensor([list(ids)], device=model.device)
    return driver, decode(CachedModel(model, cache, driver), ids, forced=True)


def collect_text(
    model: PreTrainedModel, ids: Sequence[int], rarity: Sequence[float], text_id: int, policy: Policy, block: int = 16
) -> pd.DataFrame:
    """Read one text token by token through a packed cache under `policy`; one row per token that has a next one.

    Units: entropy in nats, latency in ms for that token's own step (forward, features, policy, commit), attn_var
    unitless, accuracy 1.0 where the next token was the most probable one.
    """
    driver, result = _read(model, ids, text_id, policy, block)
    count = len(ids) - 1
    features = {name: getattr(result.features, name)[0, :count] for name in ("entropy", "confidence", "attn_var")}
    columns = {
        **{name: values.cpu().double() for name, values in features.items()},
        "rarity": rarity[:count],
        "kv_bits": driver.widths_so_far()[0, :count].cpu(),
        "latency": result.latency_ms[:count],
        "accuracy": result.correct[0].cpu().double(),
        "text_id": np.full(count, text_id),
        "position": np.arange(count),
        "token_id": ids[:count],
    }
    return pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})[COLUMNS]


def collect(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    path: str | Path,
    policy: Policy,
    block: int = 16,
    source: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Collect all `texts` (token ids, two or more each) into the CSV `path`, and its provenance into `path`.json.

    An interrupted collection is taken up after its last complete text if texts, policy, block and model shape are
    the same; else it starts anew. Several processes (see `helpers.io.processes`) share the texts of a round, and the
    main one writes. Raises `ValueError` for texts of fewer than two tokens or beyond the model's context.
    """
    path = Path(path)
    short = [i for i, ids in enumerate(texts) if len(ids) < 2]
    if short or not texts:
        raise ValueError(f"every text needs two tokens or more; too short: text(s) {short or 'none given'}")
    check_context(model, max(map(len, texts)))
    # Rarity depends on the texts before: counting them serially makes a resumed run see what a whole run sees.
    counts = TokenCounts()
    rarities = [counts.rarity(ids) for ids in texts]
    partial = path.with_name(f".{path.stem}.partial.csv")
    key = key_hash([fingerprint(model), [list(ids) for ids in texts], repr(policy), block])
    done = from_main(lambda: _resume(partial, texts, key))
    if done < len(texts):
        _read(model, texts[0][: 2 * block], 0, policy, block)  # so that first-use costs do not land in the first rows
    many = TEXTS_A_ROUND * process_count() if process_count() > 1 else 1
    hidden = not is_main_process()
    with tqdm(initial=done, total=len(texts), desc="texts", leave=False, disable=hidden) as progress:
        for first in range(done, len(texts), many):

            def one(at: int, first: int = first) -> pd.DataFrame:
                text_id = first + at
                return collect_text(model, texts[text_id], rarities[text_id], text_id, policy, block)

            tables = spread(one, [len(ids) for ids in texts[first : first + many]])
            if is_main_process():
                _append(partial, tables)
            progress.update(len(tables))
    about = {"texts": len(texts), "policy": repr(policy), "block": block, "processes": process_count()}
    return from_main(lambda: _finish(partial, path, about | (source or {})))


def _resume(partial: Path, texts: Sequence[Sequence[int]], key: str) -> int:
    """How many texts, from the first on, the partial file holds completely; it is cut to these, or begun anew."""
    partial.parent.mkdir(parents=True, exist_ok=True)
    header = f"# {key}\n"
    lines = partial.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if partial.is_file() else []
    done, at = 0, 1
    while done < len(texts) and lines[:1] == [header]:
        rows = lines[at : at + len(texts[done]) - 1]
        if len(rows) < len(texts[done]) - 1 or not all(map(_is_row, rows)):
            break
        done, at = done + 1, at + len(rows)
    with atomic_path(partial) as temporary:
        temporary.write_text("".join([header, *lines[1:at]]), encoding="utf-8")
    return done


def _is_row(line: str) -> bool:
    """Whether a line of a partial file is whole and holds a number for every column."""
    try:
        return line.endswith("\n") and len([float(part) for part in line.split(",")]) == len(COLUMNS)
    except ValueError:
        return False


def _append(partial: Path, tables: list[pd.DataFrame]) -> None:
    with explain_full_disk(partial), partial.open("a", newline="", encoding="utf-8") as file:
        for table in tables:
            table.round(6).to_csv(file, header=False, index=False)
            file.flush()


def _finish(partial: Path, path: Path, about: dict[str, object]) -> pd.DataFrame:
    """Check the complete partial file, make it the result, and write where it came from."""
    result = pd.read_csv(partial, comment="#", names=COLUMNS)
    check_training_data(result)
    write_table(path, result, about | {"rows": len(result)}, float_format=None)
    partial.unlink()
    return result
