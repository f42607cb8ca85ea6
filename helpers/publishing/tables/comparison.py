"""Tables on ways to store the cache: all methods, fixed widths, multiple choice; what Part 1 collects; the models."""

import json
from pathlib import Path

import pandas as pd

from helpers.models import model_name
from helpers.publishing.tables.layout import DATA, fixed, intervals, kl_intervals, markdown, paired_difference, points
from helpers.training import ASSIGNMENT_COLUMNS, read_training_data

MULTIPLE_CHOICE = "smollm2/hellaswag"


def comparison_table(name: str, latency: bool = False) -> str:
    """The methods of `data/NAME.csv`, written by `python main.py compare` or notebook 04."""
    table = pd.read_csv(DATA / f"{name}.csv")
    static = table.set_index("method").loc["static 4-bit"]
    full = table["method"] == "full precision"
    shown = {"method": table["method"].mask(table["group"] == "learned at settle", "**" + table["method"] + "**")}
    shown["peak bytes / static 4-bit"] = fixed(table["peak_bytes"] / static["peak_bytes"], 2)
    held, live = (fixed(table[column] / static[column], 2) for column in ("held_bytes", "live_bytes"))
    shown["held bytes (live) / static 4-bit"] = held + " (" + live + ")"
    shown |= {
        "code bits": fixed(table["code_bits"], 2),
        "KL to full precision": kl_intervals(table).mask(full, "0"),
        "next-token accuracy, points": points(table, "accuracy_change"),
    }
    if latency:
        shown["time per token / full precision"] = fixed(table["latency_ratio"], 2)
    return markdown(pd.DataFrame(shown))


def coding_table(name: str) -> str:
    """Static storage with more and more of our coding, from `data/NAME.csv` and `NAME_pairs.csv`."""
    table, pairs = pd.read_csv(DATA / f"{name}.csv"), pd.read_csv(DATA / f"{name}_pairs.csv")
    full, static = table["method"] == "full precision", table.set_index("method").loc["static 4-bit"]
    gains = pairs[(pairs["of"] == "kl") & pairs["against"].str.contains(", no ")].set_index("against")
    told = [paired_difference(gains.loc[method]) if method in gains.index else "" for method in table["method"]]
    return markdown(
        pd.DataFrame({
            "method": table["method"],
            **{f"{kind} bytes / static 4-bit": fixed(table[f"{kind}_bytes"] / static[f"{kind}_bytes"], 3)
               for kind in ("peak", "held")},
            "KL to full precision": kl_intervals(table).mask(full, "0"),
            "all of it minus this, KL": told,
            "next-token accuracy, points": points(table, "accuracy_change"),
        })
    )  # fmt: skip


def quality_table(name: str) -> str:
    """What fixed widths cost, from `data/NAME.csv` (`python main.py quality`)."""
    table = pd.read_csv(DATA / f"{name}.csv")
    return markdown(
        pd.DataFrame({
            "text": table["text"].str.split(",").str[0].str.replace("held-out text", "text"),
            "store": table["store"],
            "code bits": fixed(table["code_bits"], 2),
            **({"stored bits a number": fixed(table["stored_bits"], 2)} if "stored_bits" in table else {}),
            "KL to full precision": kl_intervals(table),
            "next-token accuracy, points": points(table, "accuracy_change"),
        })
    )  # fmt: skip


def multiple_choice_table(folder: Path = DATA) -> str:
    """HellaSwag under each policy, from `smollm2/hellaswag.csv`; nothing while that does not exist."""
    path = folder / f"{MULTIPLE_CHOICE}.csv"
    if not path.is_file():
        return ""
    about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    table = pd.read_csv(path).dropna(subset="acc_norm")
    shown = pd.DataFrame({"method": table["method"], "code bits on WikiText": fixed(table["code_bits"], 2)})
    for name, title in (("acc", "accuracy, %"), ("acc_norm", "accuracy per byte, %")):
        shown[title] = intervals(table, name, 1, 100)
        shown[f"{title.removesuffix(', %')}, points from full precision"] = points(table, f"{name}_change")
    count = about["item_count"]
    drawn = "; ".join(filter(None, [about.get("items_split", "validation"), about.get("items_schema")]))
    told = f"{count:,} items ({drawn}), model "
    told += f"{model_name(about['model'])}; chance is 25%. Contexts are read and committed first, endings score in a "
    told += "second pass; differences are paired by item."
    command = (
        "python main.py compare --preset smollm2 --texts-dir FOLDER --methods choices --rounds 0 --max-rows 8 \\\n"
    )
    command += f"  --count {count} --name {Path(MULTIPLE_CHOICE).name}"
    return f"### HellaSwag\n\n{told}\n\n```bash\n{command}\n```\n\n{markdown(shown)}"


def collected_table() -> str:
    """Means and spreads of what notebook 01 collects, and each column's correlation with the width."""
    table = read_training_data(DATA / "controller_training.csv")[ASSIGNMENT_COLUMNS]
    units = {"entropy": " (nats)", "rarity": " (nats)", "latency": " (ms)"}
    correlations = table.corr()["kv_bits"].drop("kv_bits")
    rows = [
        {
            "column": f"`{name}`{units.get(name, '')}",
            "mean (std)": f"{column.mean():.4g} ({column.std():.3g})",
            "least": f"{column.min():.4g}",
            "largest": f"{column.max():.4g}",
            "correlation with `kv_bits`": f"{correlations[name]:+.2f}" if name in correlations else "",
        }
        for name, column in table.items()
    ]
    return markdown(pd.DataFrame(rows))


def pair_table() -> str:
    """The embedded models, from `data/models/measured.json` (`python main.py card`)."""
    measured = json.loads((DATA / "models" / "measured.json").read_text(encoding="utf-8"))
    share = "{:.1%} [{:.1%}, {:.1%}]".format
    columns = {
        "": [
            "bits per byte on held-out TinyStories",
            "multiple choice, sum of log-probabilities (chance 25%)",
            "multiple choice, per byte",
            "time per token, as a share of the large one's",
        ]
    }
    for name, size, time in (("large", "3.05 M", "1"), ("small", "0.66 M", f"{measured['time_ratio']:.2f}")):
        each = measured[name]
        columns[f"{name} ({size})"] = [
            f"{each['bits_per_byte']:.3f}", share(*each["acc"]), share(*each["acc_norm"]), time
        ]  # fmt: skip
    return markdown(pd.DataFrame(columns))


def carried_table() -> str:
    """Controllers on the model that they were trained on and on the other one, from `comparison_carried.csv`."""
    rows = []
    for model, folder in (("SmolLM2", "smollm2/"), ("story model", "")):
        own, carried = (
            pd.read_csv(DATA / f"{folder}{name}.csv").set_index("method")
            for name in ("baseline_comparison", "comparison_carried")
        )
        for method in [name for name in carried.index if "learned" in name]:
            row = {"model": model, "method": method}
            for title, table in (("its own controller", own), ("the other model's", carried)):
                share = table.held_bytes[method] / table.held_bytes["static 4-bit"]
                row[f"KL with {title} (held / static 4-bit)"] = (
                    f"{kl_intervals(table.loc[[method]]).iloc[0]} ({share:.2f})"
                )
            rows.append(row)
    return markdown(pd.DataFrame(rows))
