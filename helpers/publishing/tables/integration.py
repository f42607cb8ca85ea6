"""Tables of notebook 03: methods by memory, damage and time, and their paired differences."""

from collections.abc import Sequence

import pandas as pd

from helpers.evaluation import Comparison
from helpers.publishing.tables.layout import fixed, intervals, paired_difference


def method_frame(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Some methods of a comparison's `table`: bytes and latency as shares of full precision's, KL in nats, accuracy."""
    full = table.set_index("method").loc["full precision"]
    part = table.set_index("method").loc[list(methods)]
    columns = {of: fixed(part[f"{of}_bytes"] / full[f"{of}_bytes"], 3) for of in ("peak", "held")}
    columns |= {"code bits": fixed(part["code_bits"], 2), "KL": fixed(part["kl"].abs(), 4)}
    columns |= {"next token, %": fixed(100 * part["accuracy"], 1)}
    return pd.DataFrame(columns | {"latency": intervals(part, "latency_ratio", 2)}).rename_axis("method")


def difference_frame(comparison: Comparison, methods: Sequence[str], others: Sequence[str]) -> pd.DataFrame:
    """Each of `methods` minus each of `others`, paired by sequence: next-token accuracy in points, KL in nats."""
    columns = {"accuracy, points": ("accuracy", 2, 100), "KL, nats": ("kl", 4, 1)}
    rows = {
        (method, other): {
            title: paired_difference(comparison.paired(method, other, of), digits, scale)
            for title, (of, digits, scale) in columns.items()
        }
        for method in methods
        for other in others
    }
    return pd.DataFrame(rows).T.rename_axis(["method", "against"])
