"""The learned controller: small networks that choose widths at commit and rank tokens at settle.

`CommitNet` maps a token's features to probabilities of 2, 4, 8 and 16 bits; `SettleNet` maps what is known of a token
in one head when its block settles to the damage that demoting it would do. Both are MLPs with standardised inputs.
`LearnedController` is the policy made of them. Weights are safetensors, everything else JSON.
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from helpers.features import TokenCounts, TokenFeatures
from helpers.files import atomic_path, inside, provenance, write_json
from helpers.metrics import bootstrap_groups
from helpers.packed_store import Demotion
from helpers.policies import Policy, Step, Widths, check_steps, describe_kept, describe_schedule
from helpers.quantization import WIDTHS
from helpers.sensitivity import optimal_bits

SEED_FEATURES = ("entropy", "rarity", "attn_var")
COMMIT_FEATURES = (*SEED_FEATURES, "confidence", "surprisal", "key_error", "value_error")
# Commit width and steps of the two schedules that rankings are compared on; ages and shares were chosen on stories
# that neither training nor test uses (stories3M).
QUALITY_SCHEDULE: tuple[Widths, tuple[Step, ...]] = (8, (Step(2, 4), Step(5, 2, keep=1 / 4)))
COMPACT_SCHEDULE: tuple[Widths, tuple[Step, ...]] = ((8, 4), (Step(3, (4, 2)), Step(6, (2, 2), keep=1 / 16)))
SCHEDULES = (QUALITY_SCHEDULE, COMPACT_SCHEDULE)
SETTLE_FEATURES = ("received", "key_error", "value_error", "key_error_size", "value_error_size", "place")
RATES = tuple(np.arange(2.0, 16.01, 0.25))


@dataclass
class Network:
    """An MLP with the standardisation of its inputs; `features` names them in order."""

    features: tuple[str, ...]
    mean: torch.Tensor  # [features]
    scale: torch.Tensor
    layers: nn.Sequential

    @classmethod
    def create(cls, features: Sequence[str], inputs: torch.Tensor, hidden: Sequence[int], outputs: int) -> "Network":
        """A fresh network for `inputs` `[rows, features]`; `hidden` may be empty, which makes it linear."""
        sizes = [len(features), *hidden]
        layers: list[nn.Module] = []
        for wide, narrow in pairwise(sizes):
            layers += [nn.Linear(wide, narrow), nn.ReLU()]
        layers.append(nn.Linear(sizes[-1], outputs))
        return cls(tuple(features), inputs.mean(0), inputs.std(0).clamp(min=1e-6), nn.Sequential(*layers))

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """`[..., features]` to `[..., outputs]`."""
        return self.layers((inputs - self.mean) / self.scale)

    @property
    def hidden(self) -> tuple[int, ...]:
        return tuple(layer.out_features for layer in self.layers if isinstance(layer, nn.Linear))[:-1]

    def to(self, device: torch.device) -> "Network":
        """The same network on `device`."""
        if self.mean.device == device:
            return self
        layers = copy.deepcopy(self.layers).to(device)
        return Network(self.features, self.mean.to(device), self.scale.to(device), layers)

    def save(self, folder: str | Path, name: str, about: dict[str, object]) -> None:
        """Write `name`.safetensors and `name`.json (features, sizes, `about`, provenance) into `folder`.

        The description is inside the first file too, so that weights and description are replaced as one.
        """
        tensors = {f"layers.{key}": value.contiguous() for key, value in self.layers.state_dict().items()}
        content = {"features": list(self.features), "hidden": list(self.hidden), **about}
        path = inside(folder, f"{name}.safetensors")
        with atomic_path(path) as temporary:
            tensors |= {"mean": self.mean, "scale": self.scale}
            save_file(tensors, temporary, metadata={"about": json.dumps(content)})
        write_json(path.with_suffix(".json"), content | provenance())

    @classmethod
    def load(cls, folder: str | Path, name: str, known: Sequence[str], outputs: int) -> tuple["Network", dict]:
        """Read a network and its description: that in the safetensors file, else that of the JSON beside it.

        `known` are the features that the caller can supply, `outputs` how many numbers the network must give. Nothing
        is allocated before the shapes in the file fit the description. Raises `ValueError` for a file that is not a
        network, that reads other features, or whose numbers no network can have.
        """
        path = inside(folder, f"{name}.safetensors")
        if not path.is_file():
            raise FileNotFoundError(
                f"no controller {name!r} in {folder}: run notebook 02_controller_training.ipynb first"
            )
        try:
            with safe_open(path, "pt") as file:
                about = (file.metadata() or {}).get("about") or path.with_suffix(".json").read_text(encoding="utf-8")
                about = json.loads(about)
                features, hidden = tuple(map(str, about["features"])), tuple(map(int, about["hidden"]))
                if foreign := sorted(set(features) - set(known)):
                    raise _Foreign(f"reads unknown feature(s) {foreign}; known are {list(known)}")
                _check_shapes(file, features, hidden, outputs)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
        except _Foreign as error:
            raise ValueError(f"controller {path.name}: {error}") from None
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError, SafetensorError) as error:
            raise ValueError(f"controller {path.name}: cannot be read ({type(error).__name__}: {error})") from error
        if not all(torch.isfinite(value).all() for value in tensors.values()):
            raise ValueError(f"controller {path.name}: holds NaN or infinity")
        if not (tensors["scale"] > 0).all():
            raise ValueError(f"controller {path.name}: scales of its inputs must be positive")
        network = cls.create(features, torch.zeros(2, len(features)), hidden, outputs)
        network.mean, network.scale = tensors.pop("mean"), tensors.pop("scale")
        network.layers.load_state_dict({key.removeprefix("layers."): value for key, value in tensors.items()})
        network.layers.eval().requires_grad_(False)
        return network, about


class _Foreign(Exception):
    """A file that can be read, and is not what it should be."""


def _check_shapes(file: safe_open, features: tuple[str, ...], hidden: tuple[int, ...], outputs: int) -> None:
    """Raise `_Foreign` unless an open file holds exactly the float32 tensors of a network of these sizes."""
    sizes = [len(features), *hidden, outputs]
    expected = {"mean": [len(features)], "scale": [len(features)]}
    for number, (wide, narrow) in enumerate(pairwise(sizes)):
        expected |= {f"layers.{2 * number}.weight": [narrow, wide], f"layers.{2 * number}.bias": [narrow]}
    found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    for key in sorted(expected.keys() | found.keys()):
        there = [found[key].get_dtype(), found[key].get_shape()] if key in found else "nothing"
        wanted = ["F32", expected[key]] if key in expected else "nothing"
        if there != wanted:
            raise _Foreign(
                f"its weights do not fit its description: {key} is {there}, expected {wanted} for {len(features)} "
                f"features, hidden layers {list(hidden)[:8]} and {outputs} output(s)"
            )


@dataclass
class History:
    """Losses of one training run, one entry an epoch, and the epoch whose weights were kept."""

    train: list[float] = field(default_factory=list)
    validation: list[float] = field(default_factory=list)
    best: int = 0


def _fit(network: Network, loss, train, validation, epochs: int, patience: int, batch: int, rate: float) -> History:
    """Minimise `loss(outputs, *targets)` with AdamW until `patience` epochs bring no better validation loss.

    `train` and `validation` are tuples (inputs, *targets) of equally long tensors.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are too small to be worth sharing
    optimizer = torch.optim.AdamW(network.layers.parameters(), lr=rate, weight_decay=1e-3)
    history, best_loss, best = History(), np.inf, None
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(train[0])).split(batch):
            value = loss(network(train[0][rows]), *(x[rows] for x in train[1:]))
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(network.layers.parameters(), 1.0)
            optimizer.step()
            total += value.item() * len(rows)
        history.train.append(total / len(train[0]))
        with torch.no_grad():
            history.validation.append(loss(network(validation[0]), *validation[1:]).item())
        if history.validation[-1] < best_loss - 1e-6:
            best_loss, history.best = history.validation[-1], epoch
            best = copy.deepcopy(network.layers.state_dict())
        if epoch - history.best >= patience:
            break
    torch.set_num_threads(threads)
    network.layers.load_state_dict(best)
    network.layers.eval().requires_grad_(False)
    return history


@dataclass(frozen=True)
class LossWeights:
    """Weights of the commit loss `a * CE + b * expected cost + c * expected quality loss`.

    Cost is the width over 16; quality loss is the rise of KL over its mean at 2 bits.
    """

    a: float = 1.0
    b: float = 0.0
    c: float = 0.0

    def __post_init__(self):
        values = (self.a, self.b, self.c)
        if min(values) < 0 or not any(values) or not np.isfinite(values).all():
            raise ValueError(f"loss weights must be non-negative and not all zero, got {values}")


def commit_loss(
    outputs: torch.Tensor, labels: torch.Tensor, quality: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """The seed's loss. `outputs` `[N, 4]` logits, `labels` `[N]` class indices, `quality` `[N, 4]` relative rises."""
    probabilities = outputs.softmax(-1)
    cost = probabilities @ (torch.tensor(WIDTHS, dtype=outputs.dtype) / max(WIDTHS))
    imitation = nn.functional.cross_entropy(outputs, labels)
    return weights.a * imitation + weights.b * cost.mean() + weights.c * (probabilities * quality).sum(-1).mean()


def split_texts(text_ids: np.ndarray, share: float, seed: int) -> np.ndarray:
    """True for the rows of a seeded random `share` of the texts (one text at least, never all)."""
    texts = np.unique(text_ids)
    if len(texts) < 2:
        raise ValueError(f"splitting by text needs two texts or more, got {len(texts)}")
    count = min(max(1, round(share * len(texts))), len(texts) - 1)
    return np.isin(text_ids, np.random.default_rng(seed).permutation(texts)[:count])


def train_commit(
    table: pd.DataFrame,
    features: Sequence[str] = SEED_FEATURES,
    label: str = "kv_bits",
    weights: LossWeights = LossWeights(),
    hidden: Sequence[int] = (64, 64),
    seed: int = 0,
    epochs: int = 300,
    patience: int = 20,
    validation: float = 0.2,
) -> tuple[Network, History]:
    """Train a network that maps `features` to the width in column `label`, stopping early on held-out texts.

    `table` has a row a token, with `text_id`, the features and, where `weights.c` is not 0, the columns `cost_2` to
    `cost_16` of `sensitivity`. Raises `ValueError` for missing columns.
    """
    costs = [f"cost_{bits}" for bits in WIDTHS]
    missing = [c for c in (*features, label, "text_id", *(costs if weights.c else ())) if c not in table]
    if missing:
        raise ValueError(f"the table lacks column(s) {', '.join(missing)}")
    inputs = torch.tensor(table[list(features)].to_numpy(np.float32))
    labels = torch.tensor(np.searchsorted(WIDTHS, table[label].to_numpy()))
    quality = torch.zeros(len(table), len(WIDTHS))
    if weights.c:
        quality = torch.tensor(table[costs].to_numpy(np.float32) / table[costs[0]].mean())
    held = split_texts(table["text_id"].to_numpy(), validation, seed)
    parts = [tuple(x[torch.tensor(rows)] for x in (inputs, labels, quality)) for rows in (~held, held)]
    torch.manual_seed(seed)
    network = Network.create(features, parts[0][0], hidden, len(WIDTHS))
    history = _fit(network, lambda *x: commit_loss(*x, weights), *parts, epochs, patience, batch=256, rate=2e-3)
    return network, history


Folds = list[tuple[np.ndarray, Network]]  # which rows were held out, and the network that never saw their texts


def cross_fit(table: pd.DataFrame, folds: int = 6, seed: int = 0, **settings) -> Folds:
    """Train `folds` networks (settings of `train_commit`), each without a share of the texts."""
    texts = np.random.default_rng(seed).permutation(table["text_id"].unique())
    if len(texts) < folds + 1:
        raise ValueError(f"{folds} folds need more than {folds} texts, got {len(texts)}")
    fitted = []
    for fold in range(folds):
        held = table["text_id"].isin(texts[fold::folds]).to_numpy()
        fitted.append((held, train_commit(table[~held], seed=seed + fold, **settings)[0]))
    return fitted


def held_out(table: pd.DataFrame, folds: Folds) -> np.ndarray:
    """Probabilities `[rows, 4]` of every row by the network that never saw the row's text."""
    result = np.zeros((len(table), len(WIDTHS)))
    for held, network in folds:
        inputs = torch.tensor(table.loc[held, list(network.features)].to_numpy(np.float32))
        result[held] = network(inputs).softmax(-1).numpy()
    return result


def shuffled_drops(table: pd.DataFrame, folds: Folds, label: str, seed: int = 0) -> pd.DataFrame:
    """Permutation importance on held-out texts: `feature`, `drop` in accuracy (points) and its interval over texts.

    Each feature in turn is shuffled among the rows of a held-out fold.
    """
    random = np.random.default_rng(seed)
    labels = table[label].to_numpy()
    right = np.array(WIDTHS)[held_out(table, folds).argmax(1)] == labels
    rows = []
    for name in folds[0][1].features:
        shuffled = table.copy()
        for held, _ in folds:
            shuffled.loc[held, name] = random.permutation(table.loc[held, name].to_numpy())
        lost = 100.0 * right - 100.0 * (np.array(WIDTHS)[held_out(shuffled, folds).argmax(1)] == labels)
        drop, low, high = bootstrap_groups(lambda i, lost=lost: lost[i].mean(), table["text_id"].to_numpy())
        rows.append({"feature": name, "drop": drop, "low": low, "high": high})
    return pd.DataFrame(rows)


def widths_at_price(log_probabilities: torch.Tensor, price: float) -> torch.Tensor:
    """Width of the highest `log p - price * bits`; `[..., 4]` gives integer `[...]`. Price 0 is the likeliest."""
    bits = torch.tensor(WIDTHS, device=log_probabilities.device)
    return bits[(log_probabilities - price * bits).argmax(-1)]


def price_for_average(log_probabilities: torch.Tensor, average: float) -> float:
    """The price per bit (may be negative: a bonus) at which the widths have this average on these rows."""
    low, high = -20.0, 20.0
    for _ in range(60):
        price = (low + high) / 2
        if widths_at_price(log_probabilities, price).double().mean() > average:
            low = price
        else:
            high = price
    return price


def settle_inputs(demotion: Demotion) -> torch.Tensor:
    """Features of the tokens of settling blocks for `SettleNet`, `[L, B, H, slots, features]`, no logits needed.

    All in natural logarithms but the last: received attention and errors relative to the geometric mean of the block
    in that head; the sizes of the errors; and the token's place in its block, 0 to 1.
    """

    def by_block(x: torch.Tensor) -> torch.Tensor:
        return x.float().clamp(min=1e-6).log().unflatten(-1, (-1, demotion.block))

    def relative(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    key, value = by_block(demotion.key_error), by_block(demotion.value_error)
    received = by_block(demotion.received + 1e-4)
    place = torch.arange(demotion.block, device=key.device, dtype=key.dtype) / demotion.block
    columns = [relative(received), relative(key), relative(value), key, value, place.expand_as(key)]
    return torch.stack(columns, dim=-1).flatten(-3, -2)


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
    `sensitivity.head_costs`, `text_ids` `[blocks]`. Damage is taken relative to its block's mean: what counts is the
    order within a block.
    """
    relative = (damage / damage.mean(-1, keepdim=True).clamp(min=1e-30)).float()
    held = torch.tensor(split_texts(text_ids, validation, seed))
    parts = [(inputs[rows], relative[rows]) for rows in (~held, held)]
    torch.manual_seed(seed)
    network = Network.create(SETTLE_FEATURES, parts[0][0].flatten(0, 1), hidden, 1)
    return network, _fit(network, settle_loss, *parts, epochs, patience, batch=128, rate=2e-3)


@dataclass
class LearnedController(Policy):
    """Policy of a commit network, or of a schedule and a settle network.

    With `steps` blocks are committed at `commit` and move on with age as in `AgeSchedule`, the settle network
    choosing what each head keeps. Without, the commit network gives each token its width; `price` (per bit, in units
    of log-probability) moves the average, see `at_average`. The two exclude each other, since only blocks of one
    width can be settled. Raises `ValueError` for a combination that has no meaning.
    """

    commit_net: Network | None = None
    settle_net: Network | None = None
    commit: Widths = 8
    steps: tuple[Step, ...] = ()
    price: float = 0.0
    rates: dict[float, float] = field(default_factory=dict)  # average bits on the training texts -> price
    label: str = "learned"
    start_counts: TokenCounts | None = None

    def __post_init__(self):
        if self.steps:
            check_steps(self.steps)
            if self.commit_net is not None:
                raise ValueError(
                    "a commit network and steps exclude each other: it gives the tokens of a block several widths, and "
                    "only blocks of one width can be settled"
                )
            if self.settle_net is None and self.steps[-1].keep:
                raise ValueError("steps that keep tokens need a settle network")
        elif self.commit_net is None:
            raise ValueError("a LearnedController needs a commit network, or steps with a settle network")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        name: str = "settle",
        commit: Widths = 8,
        steps: tuple[Step, ...] | None = None,
        average: float | None = None,
    ) -> "LearnedController":
        """The controller `name` in `folder`: "settle" (with the default steps unless given), "commit" or "seed".

        `average` asks a commit network for that average width (as on its training texts).
        """
        if name == "settle":
            net, _ = Network.load(folder, name, SETTLE_FEATURES, 1)
            return cls(settle_net=net, commit=commit, steps=QUALITY_SCHEDULE[1] if steps is None else steps)
        net, about = Network.load(folder, name, tuple(TokenFeatures.__dataclass_fields__), len(WIDTHS))
        try:
            rates = {float(rate): float(price) for rate, price in about.get("rates", {}).items()}
            numbers = {int(token): int(count) for token, count in about.get("token_counts", {}).items()}
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"controller {name}: its rates or token counts are no numbers ({error})") from error
        if not np.isfinite([*rates, *rates.values()]).all() or min(numbers.values(), default=0) < 0:
            raise ValueError(f"controller {name}: its rates must be finite and its token counts 0 or more")
        counts = TokenCounts(numbers)
        controller = cls(commit_net=net, rates=rates, label=f"learned, {name}", start_counts=counts)
        return controller if average is None else controller.at_average(average)

    def at_average(self, average: float) -> "LearnedController":
        """A copy whose commit widths have this average on the training texts (interpolated between known rates)."""
        known = sorted(self.rates)
        if not known or not known[0] <= average <= known[-1]:
            span = f"{known[0]} and {known[-1]}" if known else "no known rates"
            raise ValueError(f"average must lie between {span} bits, got {average}")
        price = float(np.interp(average, known, [self.rates[rate] for rate in known]))
        return LearnedController(**{**_shallow(self), "price": price, "label": f"{self.label} at {average:g} bits"})

    @property
    def name(self) -> str:
        if not self.steps:
            return self.label
        return f"{describe_schedule(self.commit, self.steps)}, {describe_kept(self.steps)} by learned score"

    @property
    def needs(self) -> tuple[str, ...]:
        return self.commit_net.features if self.commit_net else ()

    @property
    def needs_received(self) -> bool:
        return bool(self.steps and self.steps[-1].keep)

    @torch.no_grad()
    def widths(self, features: TokenFeatures, batch: int, tokens: int) -> torch.Tensor | Widths:
        if self.steps:
            return self.commit
        inputs = torch.stack([getattr(features, name) for name in self.commit_net.features], dim=-1)
        self.commit_net = self.commit_net.to(inputs.device)
        return widths_at_price(self.commit_net(inputs.float()).log_softmax(-1), self.price)

    @torch.no_grad()
    def scores(self, demotion: Demotion, features: TokenFeatures) -> torch.Tensor:
        self.settle_net = self.settle_net.to(demotion.key_error.device)
        return self.settle_net(settle_inputs(demotion))[..., 0]


def _shallow(controller: LearnedController) -> dict:
    return {name: getattr(controller, name) for name in controller.__dataclass_fields__}


def rate_table(network: Network, table: pd.DataFrame) -> dict[float, float]:
    """For a range of average widths that the network can reach on the rows of `table`: average -> price."""
    inputs = torch.tensor(table[list(network.features)].to_numpy(np.float32))
    log_p = network(inputs).log_softmax(-1)
    rates = {}
    for average in RATES:
        price = price_for_average(log_p, average)
        reached = widths_at_price(log_p, price).double().mean().item()
        if abs(reached - average) < 0.1:
            rates[float(average)] = round(price, 6)
    return rates


def save_commit(network: Network, folder: str | Path, name: str, table: pd.DataFrame, about: dict[str, object]) -> None:
    """Save a commit network with what its use needs: its rates on `table` and the token counts of its texts."""
    counts = {int(token): int(count) for token, count in table["token_id"].value_counts().sort_index().items()}
    network.save(folder, name, {**about, "rates": rate_table(network, table), "token_counts": counts})


def rate_distortion(
    costs: np.ndarray, probabilities: np.ndarray | None = None, averages: Sequence[float] = (2.5, 3, 3.5, 4, 5, 6, 8)
) -> pd.DataFrame:
    """Mean cost (nats a token) of the chosen widths at several averages: columns `bits`, `cost`, `blind`.

    `costs` `[T, 4]`. Widths are those of the `probabilities` `[T, 4]` at a price, or without these the optimal ones.
    `blind` is the cost of the same widths dealt out at random, exactly.
    """
    rows = []
    for average in averages:
        if probabilities is None:
            widths, _ = optimal_bits(costs, average)
        else:
            log_p = torch.tensor(probabilities).clamp(min=1e-12).log()
            widths = widths_at_price(log_p, price_for_average(log_p, average)).numpy()
        at = np.searchsorted(WIDTHS, widths)
        blind = np.bincount(at, minlength=len(WIDTHS)) / len(at) @ costs.mean(0)
        rows.append({"bits": widths.mean(), "cost": costs[np.arange(len(at)), at].mean(), "blind": blind})
    return pd.DataFrame(rows)


def cross_validate_settle(
    inputs: torch.Tensor, damage: torch.Tensor, text_ids: np.ndarray, folds: int = 4, seed: int = 0, **settings
) -> torch.Tensor:
    """Scores `[blocks, block]` for every block by networks that never saw its text; settings of `train_settle`."""
    texts = np.random.default_rng(seed).permutation(np.unique(text_ids))
    scores = torch.zeros(damage.shape)
    for fold in range(folds):
        held = torch.tensor(np.isin(text_ids, texts[fold::folds]))
        rest = ~held
        network, _ = train_settle(inputs[rest], damage[rest], text_ids[rest.numpy()], seed=seed + fold, **settings)
        scores[held] = network(inputs[held])[..., 0]
    return scores


def write_controller_card(folder: str | Path) -> None:
    """Write `README.md` beside the controllers of `folder`: what each reads, was trained on, and is for."""
    lines = ["# Controllers", "", "Small networks that choose KV-cache widths; written by notebook 02.", ""]
    lines += ["| controller | reads | hidden layers | label | trained for model |", "|---|---|---|---|---|"]
    for path in sorted(Path(folder).glob("*.safetensors")):
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        hidden = " x ".join(map(str, about["hidden"])) or "none"
        lines.append(
            f"| `{path.stem}` | {', '.join(about['features'])} | {hidden} | {about['label']} | {about['model']} |"
        )
    lines += [
        "",
        "`helpers.controller.LearnedController.load(folder, name)` reads them. Each is a safetensors file with the",
        "means and scales of its inputs, and a JSON with everything else. They know one model: train your own with",
        "`python main.py train`.",
        "",
    ]
    with atomic_path(Path(folder) / "README.md") as temporary:
        temporary.write_text("\n".join(lines), encoding="utf-8")
