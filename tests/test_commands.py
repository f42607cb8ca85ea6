"""The commands that draw figures beside what they measure, and what a device tells of itself."""

import torch

from helpers.evaluation.benchmark import load_benchmarks
from helpers.evaluation.device import copy_bandwidth
from helpers.io import ROOT
from helpers.publishing import commands
from helpers.training.model_card import PAIR


def test_the_card_is_measured_written_and_drawn(monkeypatch, capsys):
    written, drawn = [], []
    measured = {name: {"bits_per_byte": 1.0} for name in PAIR} | {"ms_per_token": dict.fromkeys(PAIR, 2.5)}
    monkeypatch.setattr(commands, "measure_pair", lambda folder, items, text: measured)
    monkeypatch.setattr(commands, "write_pair_card", lambda folder, found: written.append((folder, found)))
    monkeypatch.setattr(commands.plots, "save_figure", lambda figure, folder, name: drawn.append(name))
    commands.card()
    assert written == [(ROOT / "data" / "models", measured)]
    assert drawn == ["00_training_curves"]
    assert capsys.readouterr().out.count("2.50 ms per token") == len(PAIR)


def test_the_benchmark_is_drawn_where_asked_for(monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(commands, "run_benchmark_command", lambda options: load_benchmarks()["device"].iloc[0])
    monkeypatch.setattr(commands.plots, "save_figure", lambda figure, folder, name: drawn.append(name) or folder / name)
    commands.bench(commands.BenchOptions())
    assert not drawn
    commands.bench(commands.BenchOptions(), figure=True)
    assert drawn == ["04_kernels"]
    assert "figures/04_kernels" in capsys.readouterr().out


def test_copying_takes_time():
    assert 1e6 < copy_bandwidth(torch.device("cpu"), megabytes=1, repeats=2) < 1e13
