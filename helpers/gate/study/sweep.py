"""One signal against another: gates at several usages, and how far their curves lie above the random control's."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from helpers.evaluation import bootstrap_groups
from helpers.gate.correction import measure_usage
from helpers.gate.gate import EntropyGate
from helpers.gate.learned import LearnedSignal
from helpers.gate.pairs import Pair
from helpers.gate.signals import SIGNALS, Signal, find_signal
from helpers.gate.text import LARGE, SMALL


def threshold_on_gated_text(
    pair: Pair,
    prompts: list[str],
    signal: str | Signal,
    usage: float,
    max_new_tokens: int = 50,
    passes: int = 2,
    **settings,
) -> EntropyGate:
    """The gate at the percentile 100 (1 - usage) of the signal on the text that the gate itself writes.

    Begins with the small model's text and repeats with the gated one, `passes` times in all. Usage elsewhere is near
    the target but not it; the oracle cannot fire more often than the models differ.
    """
    gate = EntropyGate(-np.inf if usage == 1 else np.inf, signal)
    if usage in (0, 1):
        return gate
    if gate.signal.uniform:
        return EntropyGate(1 - usage, signal)
    for _ in range(passes):
        _, signals = measure_usage(*pair, prompts, gate, max_new_tokens, **settings)
        gate = EntropyGate(float(np.quantile(signals, 1 - usage)), signal)
    return gate


def sweep_gates(
    pair: Pair,
    prompts: list[str],
    signals: Sequence[str | Signal],
    usages: Sequence[float],
    max_new_tokens: int = 50,
    **settings,
) -> dict[str, EntropyGate]:
    """A gate for each signal and usage by `threshold_on_gated_text`, by the name "signal usage"."""
    return {
        f"{find_signal(signal).name} {usage:g}": threshold_on_gated_text(
            pair, prompts, signal, usage, max_new_tokens, **settings
        )
        for signal in signals
        for usage in usages
    }


def gains_over_random(
    table: pd.DataFrame,
    gates: dict[str, EntropyGate],
    of: str = "fidelity",
    at: float = 0.2,
    resamples: int = 1000,
    groups: np.ndarray | None = None,
) -> pd.DataFrame:
    """How far each signal's curve of `of` over usage lies above the random one's, paired over the same prompts.

    Curves run straight from the small model alone (usage 0) over the gates to the large one alone (usage 1); a signal
    with another rollback is another curve, and gates that differ in their seed only are averaged into one point.
    `gain` is the distance at usage `at`, `area` the mean distance over all usages, `over_entropy` how far the curve
    lies above that of entropy at `at` (NaN without one); all with 95% bootstrap intervals over prompts, or over whole
    `groups` `[prompts]` of them, in the order of their numbers. `of_oracle` is the share of the oracle's gain.
    """
    wide = table.assign(written=table["usage"] * table["tokens"]).pivot(index="prompt", columns="method")
    groups = np.arange(len(wide)) if groups is None else groups
    grid = np.linspace(0, 1, 101)
    arrays = {
        method: wide.xs(method, axis=1, level=1)[[of, "written", "tokens"]].to_numpy(float)
        for method in (*gates, SMALL, LARGE)
    }
    curves: dict[str, dict[float, list[np.ndarray]]] = {}
    order = [*SIGNALS, LearnedSignal.name]
    for name, gate in sorted(gates.items(), key=lambda item: order.index(item[1].signal.name)):
        label = gate.signal.name + ("" if gate.rollback is None else f", rollback {gate.rollback:g}")
        curves.setdefault(label, {}).setdefault(gate.threshold, []).append(arrays[name])

    def curve(name: str, rows: np.ndarray) -> np.ndarray:
        points = [(0.0, arrays[SMALL][rows, 0].mean()), (1.0, arrays[LARGE][rows, 0].mean())]
        for same in curves[name].values():
            quality, written, tokens = np.mean([array[rows].mean(axis=0) for array in same], axis=0)
            points.append((written / tokens, quality))
        return np.interp(grid, *zip(*sorted(points), strict=True))

    def distance(name: str, measure: Callable[[np.ndarray], float], base: str = "random") -> tuple[float, float, float]:
        if base not in curves:
            return (np.nan,) * 3
        return bootstrap_groups(lambda rows: float(measure(curve(name, rows) - curve(base, rows))), groups, resamples)

    def there(above: np.ndarray) -> float:
        return np.interp(at, grid, above)

    names = [name for name in curves if name != "random"]
    found = [[*distance(name, there), *distance(name, np.mean), *distance(name, there, "entropy")] for name in names]
    columns = [f"{of}{end}" for of in ("gain", "area", "over_entropy") for end in ("", "_low", "_high")]
    gains = pd.DataFrame(found, pd.Index(names, name="signal"), columns)
    return gains.assign(of_oracle=gains["gain"] / gains["gain"].get("oracle", np.nan))
