"""Tables on the evaluation harness, on facts in long texts, and on a conversation."""

import pandas as pd

from helpers.evaluation.facts import fact_summary
from helpers.publishing.tables.layout import DATA, interval, markdown

TASKS = ("hellaswag_ctx", "openbookqa_ctx", "wikitext_articles")
SHARES = ("acc", "acc_norm")
TITLES = {"acc": "accuracy, %", "acc_norm": "per byte, %", "word_perplexity": "word perplexity"}


def harness_frame() -> pd.DataFrame:
    """What tasks of the harness score through committed caches, from `data/smollm2/harness_*.csv`.

    In brackets behind each value its change from full precision with 95% interval, paired by item: in points, of
    perplexity in percent.
    """
    rows = []
    for task in TASKS:
        table = pd.read_csv(DATA / "smollm2" / f"harness_{task}.csv")
        for method, part in table.groupby("method", sort=False):
            row = {"task": f"{task}, {part['items'].iloc[0]} items", "method": method} | dict.fromkeys(
                TITLES.values(), ""
            )
            for each in part.to_dict("records"):
                value = f"{(100 if each['metric'] in SHARES else 1) * each['value']:.1f}"
                change = interval(each, "change", 1, 100, sign=True)
                row[TITLES[each["metric"]]] = value if method == "full precision" else f"{value} ({change})"
            rows.append(row)
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
