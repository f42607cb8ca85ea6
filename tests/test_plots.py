"""Every figure: drawn, legible at the size of a page, and with nothing cut off."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from helpers.cache.quantization import WIDTHS
from helpers.evaluation.benchmark.results import load_benchmarks
from helpers.io.paths import ROOT
from helpers.publishing import plots
from helpers.training.fitting import History
from helpers.training.table import ASSIGNMENT_COLUMNS, read_training_data

DATA = ROOT / "data"
TITLE = "A title that says what was found, and that is far too long to stand in one line of a small figure"
SUBTITLE = "data/models/large, 5258 tokens of 24 texts; bars: 95% interval over rows; four interleaved rounds; and more"
HEAD = (TITLE, SUBTITLE)
RANDOM = np.random.default_rng(0)
SOME_WIDTHS = RANDOM.choice(WIDTHS, 200)


def training_table():
    return read_training_data(DATA / "controller_training.csv").head(600)


def comparison():
    table = pd.read_csv(DATA / "baseline_comparison.csv")
    return table.assign(share=table["held_bytes"] / table["held_bytes"].min()).query("kl > 0").head(8)


def sweep():
    return pd.read_csv(DATA / "gate_sweep.csv")


def lengths():
    rows = [
        [name, n, 2.0 * n * size if n > 128 else float("nan"), 1.1 * n * size, n * size, n / 100]
        for name, size in (("a", 900), ("b", 200))
        for n in (128, 512, 4096)
    ]
    return pd.DataFrame(rows, columns=["method", "tokens", "peak_bytes", "held_bytes", "live_bytes", "latency_ms"])


def history():
    falling = [1 / (1 + epoch) for epoch in range(20)]
    return History(falling, [0.3 + value for value in falling], 15)


def drops():
    rows = [("imitation", "entropy", 60.0), ("imitation", "rarity", 0.1), ("commit", "key_error", 0.4)]
    table = pd.DataFrame(rows, columns=["controller", "feature", "drop"])
    return table.assign(low=table["drop"] - 0.3, high=table["drop"] + 0.3)


def steps():
    signal = RANDOM.random(40) * 6
    return pd.DataFrame({"step": range(40), "signal": signal, "fired": signal > 4})


CURVE = pd.DataFrame({"bits": [2.0, 4.0, 8.0], "cost": [0.2, 0.01, 0.0001]})
USAGE = ("fidelity", (0.2, 1.0), "fidelity: ROUGE-L to the large model alone")
LABELS = {"share": "held bytes", "kl": "KL to full precision", "accuracy_change": "change of accuracy"}
FIGURES = {
    "benchmark_figure": lambda: plots.benchmark_figure(load_benchmarks()),
    "entropy_against_rarity": lambda: plots.entropy_against_rarity(training_table(), *HEAD),
    "correlation_heat_map": lambda: plots.correlation_heat_map(training_table(), ASSIGNMENT_COLUMNS, *HEAD),
    "latency_distribution": lambda: plots.latency_distribution(training_table(), 16, *HEAD),
    "tokens_by_width": lambda: plots.tokens_by_width(
        ["Once", " upon", "\n", "$x$"] * 20, [2, 4, 8, 3.3] * 20, "A", "b"
    ),
    "tokens_by_author": lambda: plots.tokens_by_author(
        ["a", "b"] * 30, ["small", "large"] * 30, [1.0, 5.0] * 30, "A", "b"
    ),
    "training_curves": lambda: plots.training_curves(
        {name: pd.DataFrame({"tokens": [1e6, 2e6, 3e6], "loss": [4, 3, 2]}) for name in ("large", "small")}, *HEAD
    ),
    "learning_curves": lambda: plots.learning_curves({"imitation": history(), "commit": history()}, *HEAD),
    "learning_curves, one": lambda: plots.learning_curves({"settle": history()}, *HEAD),
    "confusion_matrices": lambda: plots.confusion_matrices(
        {"imitation: kv_bits": (SOME_WIDTHS, SOME_WIDTHS), "commit: optimal_bits": (SOME_WIDTHS, SOME_WIDTHS[::-1])},
        *HEAD,
    ),
    "importances": lambda: plots.importances(drops(), *HEAD),
    "reliability": lambda: plots.reliability(
        {name: (RANDOM.random(400), RANDOM.random(400) > 0.5) for name in ("imitation", "commit")}, *HEAD
    ),
    "rate_distortion": lambda: plots.rate_distortion(
        {"optimal (knows the costs)": CURVE, "commit controller": CURVE.assign(cost=2 * CURVE["cost"])},
        {"static 4": (4.0, 0.02)},
        *HEAD,
    ),
    "pareto": lambda: plots.pareto(comparison(), "share", "kl", LABELS, *HEAD, log=True),
    "pareto, linear": lambda: plots.pareto(comparison(), "share", "accuracy_change", LABELS, *HEAD),
    "against_length": lambda: plots.against_length(lengths(), {"a": "static", "b": "stock"}, *HEAD),
    "bytes_over_text": lambda: plots.bytes_over_text(lengths().assign(group="static"), *HEAD),
    "kl_bars": lambda: plots.kl_bars(comparison(), *HEAD),
    "kl_bars, none": lambda: plots.kl_bars(comparison().head(0), *HEAD),
    "facts_by_depth": lambda: plots.facts_by_depth(
        pd.DataFrame(
            {
                "method": ["a", "b"] * 40,
                "length": [2048] * 40 + [4096] * 40,
                "depth": RANDOM.random(80),
                "found": RANDOM.integers(2, size=80),
            }
        ),
        {"a": "static", "b": "stock"},
        0.25,
        *HEAD,
    ),
    "latency_bars": lambda: plots.latency_bars(comparison(), *HEAD),
    "signal_distributions": lambda: plots.signal_distributions(
        {"read": RANDOM.random(500) * 8, "written": RANDOM.random(500) * 6}, {"80th percentile": 4.0}, "bits", *HEAD
    ),
    "gate_trace": lambda: plots.gate_trace(steps(), 4.0, *HEAD),
    "against_usage": lambda: plots.against_usage(sweep(), *USAGE, *HEAD),
    "speedup_against_usage": lambda: plots.speedup_against_usage(sweep(), {"assisted": 0.75}, *HEAD),
    "gate_choice": lambda: plots.gate_choice(sweep().query("signal == 'entropy'"), sweep().iloc[0], *HEAD),
}


def test_every_figure_is_listed():
    public = [name for name in dir(plots) if not name.startswith("_")]
    drawn = {
        name for name in public if getattr(getattr(plots, name), "__annotations__", {}).get("return") is plt.Figure
    }
    assert drawn == {name.split(",")[0] for name in FIGURES}


@pytest.mark.parametrize("name", FIGURES)
def test_drawn_saved_and_whole(name, tmp_path):
    figure = FIGURES[name]()
    path = plots.save_figure(figure, tmp_path, "01_x")
    pixels = plt.imread(path)
    assert pixels.shape[1] <= 9 * 150
    assert np.allclose(pixels[0, 0, :3], 1)  # white, not transparent
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
    # What `bbox_inches` would have to make room for was meant to be inside.
    width, height = figure.get_size_inches()
    box = figure.get_tightbbox()
    assert box.x0 > -0.15
    assert box.x1 < width + 0.25
    assert box.y1 < height + 0.05
    plt.close(figure)


def test_headings_do_not_overlap():
    figure = FIGURES["reliability"]()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    title, subtitle = (text.get_window_extent(renderer) for text in figure.texts)
    axes = figure.axes[0].get_window_extent(renderer)
    assert title.y0 > subtitle.y1
    assert subtitle.y0 > axes.y1
    plt.close(figure)


def test_a_figure_drawn_twice_has_the_same_bytes(tmp_path):
    saved = [plots.save_figure(FIGURES["latency_distribution"](), tmp_path / name, "01_x") for name in "ab"]
    first, second = (path.read_bytes() for path in saved)
    assert first == second
    assert b"Software" not in first
    assert b"Creation" not in first
    plt.close("all")


def test_no_more_points_than_can_be_labelled():
    many = pd.concat([comparison(), comparison().head(1)])
    with pytest.raises(ValueError, match="at most 8 methods to be labelled, got 9"):
        plots.pareto(many, "share", "kl", LABELS, *HEAD)
