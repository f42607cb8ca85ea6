"""How a table of the documents looks: Markdown, numbers with intervals; and where the results files lie."""

import re

import pandas as pd

from helpers.io import ROOT

DATA = ROOT / "data"
BENCHMARKS = DATA / "benchmarks"


def markdown(table: pd.DataFrame) -> str:
    """A table of strings as Markdown, without its index.

    >>> print(markdown(pd.DataFrame({"method": ["static 4-bit"], "KL": ["0.50"]})))
    | method | KL |
    |---|---|
    | static 4-bit | 0.50 |
    """
    text = table.to_markdown(index=False, disable_numparse=True, stralign=None)
    return re.sub(r"-{4,}", "---", text, count=table.shape[1])  # as wide as the longest cell is too wide to read


def interval(row: pd.Series | dict, name: str, digits: int, scale: float = 1, sign: bool = False) -> str:
    """`value [low, high]` of the entries `name`, `name_low` and `name_high`.

    >>> interval({"kl": 0.25, "kl_low": 0.2, "kl_high": 0.3}, "kl", 2)
    '0.25 [0.20, 0.30]'
    """
    form = f"{'+' if sign else ''}.{digits}f"
    value, low, high = (format(scale * row[key], form) for key in (name, f"{name}_low", f"{name}_high"))
    return f"{value} [{low}, {high}]"


def intervals(table: pd.DataFrame, name: str, digits: int, scale: float = 1, sign: bool = False) -> pd.Series:
    """`interval` of each row; "" where there is no value."""
    rows = table.to_dict("records")
    texts = ["" if pd.isna(row[name]) else interval(row, name, digits, scale, sign) for row in rows]
    return pd.Series(texts, table.index, dtype=object)


def paired_difference(row: pd.Series | dict, digits: int = 4, scale: float = 1) -> str:
    """`difference [low, high]` of a row of a table of paired differences."""
    named = {"difference": row["difference"], "difference_low": row["low"], "difference_high": row["high"]}
    return interval(named, "difference", digits, scale, sign=True)


def kl_intervals(table: pd.DataFrame) -> pd.Series:
    """KL with interval, a digit more where it is below 0.001 nats."""
    return intervals(table, "kl", 5).where(table["kl"] < 0.001, intervals(table, "kl", 4))


def points(table: pd.DataFrame, name: str) -> pd.Series:
    """A difference of shares to full precision, in percentage points; none for full precision itself."""
    methods = table.get("method", pd.Series("", table.index))
    return intervals(table, name, 2, 100, sign=True).mask(methods == "full precision", "")


def fixed(numbers: pd.Series, digits: int) -> pd.Series:
    """Numbers as text, "" for those that are not there."""
    return numbers.map(lambda number: "" if pd.isna(number) else f"{number:.{digits}f}").astype(object)
