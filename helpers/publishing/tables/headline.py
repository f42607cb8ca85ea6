"""The one table of the README: the main results, each with its interval and the command or notebook behind it."""

import pandas as pd

from helpers.publishing.tables.benchmark import decode_rows
from helpers.publishing.tables.gate import gate_benchmarks
from helpers.publishing.tables.layout import DATA, interval, markdown, paired_difference
from helpers.publishing.tables.memory import memory_rows


def headline_table() -> str:
    """Headline results on SmolLM2 (the cache) and the embedded pair (the gate)."""
    name = "smollm2/baseline_comparison"
    table = pd.read_csv(DATA / f"{name}.csv").set_index("method")
    pairs = pd.read_csv(DATA / f"{name}_pairs.csv").query("of == 'kl'").set_index(["method", "against"])
    start = "K4 V4-2 @6, best V25% by "
    learned = f"{start}learned score"
    measures = ["peak_bytes", "held_bytes", "kl"]
    shares = table.loc[learned, measures].astype(float) / table.loc["static 4-bit", measures].astype(float)
    at_bytes = f"at {shares['peak_bytes']:.2f} of its peak and {shares['held_bytes']:.2f} of its held bytes"

    def paired(method: str, other: str) -> str:
        return paired_difference(pairs.loc[(method, other)])

    usage = pd.read_csv(DATA / "gate_usage.csv").set_index("gate").loc["tracking 20%"]
    speed = pd.read_csv(DATA / "gate_speed.csv").set_index("of")
    gains = pd.read_csv(DATA / "gate_fidelity_gains.csv").query("of == 'fidelity'").set_index("signal")
    share = gate_benchmarks()["embedded"]["speed"]["share"]
    compare, notebook = "`main.py compare`", "notebook 05"
    rows = [
        *memory_rows(),
        ("learned at settle: KL over static 4-bit's", f"{shares['kl']:.1f} {at_bytes}", compare),
        ("its KL minus that of a random choice on the same schedule", paired(learned, f"{start}random"), compare),
        ("... of attention x error, the best hand-made one", paired(learned, f"{start}attention x error"), compare),
        (f"its next-token accuracy at {table.loc[learned, 'code_bits']:.1f} code bits, points from full precision",
         interval(table.loc[learned], "accuracy_change", 2, 100, sign=True), compare),
        ("the entropy rule's KL minus that of its own widths at random",
         paired("rule-based dynamic", "random as rule-based dynamic"), compare),
        *decode_rows(),
        ("gate aimed at 20%: tokens of the large model (%)", interval(usage, "usage", 1), notebook),
        (f"speed-up of a gate at {100 * speed.loc['usage', 'value']:.0f}% over the large model",
         interval(speed.loc["speedup vs large"], "value", 2), notebook),
        ("... over assisted generation", interval(speed.loc["speedup vs assisted"], "value", 2), notebook),
        ("share of the ideal speed-up that arrives (target: 0.85)", f"{share:.2f}",
         "`main.py gate-bench --pair embedded`"),
        ("fidelity of the entropy gate minus a random gate's, 20% usage",
         interval(gains.loc["entropy"], "gain", 3, sign=True), "`main.py gate-fidelity`"),
        ("... of the learned signal", interval(gains.loc["learned"], "gain", 3, sign=True), "`main.py gate-fidelity`"),
        ("... minus entropy's gain", interval(gains.loc["learned"], "over_entropy", 3, sign=True),
         "`main.py gate-fidelity`"),
    ]  # fmt: skip
    return markdown(pd.DataFrame(rows, columns=["result", "value [95% interval]", "from"]))
