"""The table on weights at 8 bits."""

import pandas as pd

from helpers.publishing.tables.layout import DATA, interval, markdown

WEIGHTS = {
    "kl": "KL to full precision (nats)",
    "accuracy change": "next-token accuracy, points",
    "acc change": "HellaSwag by sums, points",
    "acc_norm change": "HellaSwag per byte, points",
    "step time ratio": "time of a decode step after 128 tokens, over full precision's",
    "prompt time ratio": "time of reading 128 tokens, over full precision's",
}


def weights_table() -> str:
    """What weights at 8 bits cost and gain on SmolLM2, from `data/smollm2/weights_int8.csv`."""
    table = pd.read_csv(DATA / "smollm2" / "weights_int8.csv")
    table = table.rename(columns={"low": "value_low", "high": "value_high"})
    rows = []
    for row in table.to_dict("records"):
        points = row["measure"].endswith("change")
        shown = interval(row, "value", 1, 100, True) if points else interval(row, "value", 3)
        rows.append({"measure": WEIGHTS[row["measure"]], "weights at 8 bits": shown, "n": str(row["n"])})
    return markdown(pd.DataFrame(rows))
