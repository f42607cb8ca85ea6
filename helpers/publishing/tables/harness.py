"""Tables on the evaluation harness, on facts in long texts, and on a conversation."""

import pandas as pd

from helpers.evaluation.facts import fact_summary
from helpers.publishing.tables.layout import DATA, interval, markdown

TASKS = ("hellaswag_ctx", "openbookqa_ctx", "wikitext_articles")
TITLES = {"acc": "accuracy, %", "acc_norm": "accuracy per byte, %", "word_perplexity": "word perplexity"}


def harness_frame() -> pd.DataFrame:
    """What tasks of the harness score through committed caches, from `data/smollm2/harness_*.csv`."""
    rows = []
    for task in TASKS:
        table = pd.read_csv(DATA / "smollm2" / f"harness_{task}.csv")
        for row in table.to_dict("records"):
            percent = row["metric"] != "word_perplexity"
            scale, change = (100, "points") if percent else (1, "%")
            rows.append({
                "task": f"{task}, {row['items']} items",
                "measure": TITLES[row["metric"]],
                "method": row["method"],
                "value": interval(row | {"value_low": row["low"], "value_high": row["high"]}, "value", 1, scale),
                "change": ""
                if row["method"] == "full precision"
                else f"{interval(row, 'change', 2, 100, sign=True)} {change}",
            })  # fmt: skip
    return pd.DataFrame(rows)


def harness_table() -> str:
    """`harness_frame` as Markdown."""
    return markdown(harness_frame())


def chat_table() -> str:
    """What ten turns of a conversation cost, from `data/smollm2/chat.csv`."""
    table = pd.read_csv(DATA / "smollm2" / "chat.csv")
    rows = []
    for method, part in table.groupby("method", sort=False):
        thirds = [part.kl[part.turn.between(*turns)].mean() for turns in ((1, 3), (4, 7), (8, 10))]
        strays = " / ".join(f"{kl:.4f}" for kl in thirds)
        rows.append({
            "cache": method,
            "tokens read for the turns": f"{part['read'].sum():,}",
            "seconds": f"{part.seconds.sum():.0f}",
            "held at the end, MiB": f"{part.held_bytes.iloc[-1] / 2**20:.1f}",
            "KL in turns 1-3 / 4-7 / 8-10": "0" if part.kl.abs().max() < 1e-6 else strays,
        })  # fmt: skip
    return markdown(pd.DataFrame(rows))


def facts_table() -> str:
    """How many facts of long texts each method finds, from `data/smollm2/facts.csv`."""
    summary = fact_summary(pd.read_csv(DATA / "smollm2" / "facts.csv"))
    summary["shown"] = [interval(row, "found", 0, 100) for row in summary.to_dict("records")]
    tokens = summary["length"].map("{:,} tokens".format) + summary["facts"].map(" ({} facts)".format)
    wide = summary.assign(tokens=tokens).pivot(index="method", columns="tokens", values="shown")
    order = tokens.unique()
    return markdown(wide.loc[summary["method"].unique(), order].rename_axis("facts found, %").reset_index())
