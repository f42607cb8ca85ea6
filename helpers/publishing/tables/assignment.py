"""The assignment's table: what it asks to compare, by accuracy, latency and peak memory, on both models."""

import pandas as pd

from helpers.publishing.tables.layout import DATA, interval, markdown

SETTLED = "K4 V4-2 @6, best V25% by "
ROWS = {
    "full precision": "full precision",
    "static 4-bit, ours": "static 4-bit",
    "static 4-bit, the library's (quanto)": "stock quanto 4-bit, residual 128",
    "rule-based dynamic (Part 1)": "rule-based dynamic",
    "learned controller, as assigned (imitation)": "learned, imitation",
    "learned controller, at settle": f"{SETTLED}learned score",
    "... its schedule, tokens drawn at random": f"{SETTLED}random",
}
MODELS = {"SmolLM2": DATA / "smollm2", "story model": DATA}


def assignment_frame(models: tuple[str, ...] = tuple(MODELS)) -> pd.DataFrame:
    """A row a method, and for each model: accuracy of the next token and in multiple choice, latency (as notebook 03
    measured it), peak memory.
    """
    parts = {}
    for model in models:
        table = pd.read_csv(MODELS[model] / "baseline_comparison.csv").set_index("method")
        choices, choice_name = table, "own multiple choice, %"
        if model == "SmolLM2":
            choices, choice_name = pd.read_csv(DATA / "smollm2" / "hellaswag.csv").set_index("method"), "HellaSwag, %"
        latency = pd.read_csv(MODELS[model] / "integration.csv").set_index("method")["latency_ratio"]
        full, columns = table.loc["full precision"], {}
        for title, method in ROWS.items():
            row = table.loc[method]
            change = "" if method == "full precision" else interval(row, "accuracy_change", 1, 100, sign=True)
            columns[title] = {
                "next token, %": f"{100 * row['accuracy']:.1f}",
                "points from full precision": change.replace("-0.0 ", "0.0 "),
                choice_name: f"{100 * choices['acc'].get(method, float('nan')):.1f}".replace("nan", "-"),
                "latency": f"{latency[method]:.2f}",
                "peak memory": f"{row['peak_bytes'] / full['peak_bytes']:.2f}",
            }
        parts[model] = pd.DataFrame(columns).T
    return pd.concat(parts, axis=1)


def assignment_table() -> str:
    """`assignment_frame` of SmolLM2 as Markdown."""
    return markdown(assignment_frame(("SmolLM2",))["SmolLM2"].rename_axis("KV cache").reset_index())
