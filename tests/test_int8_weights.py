"""Weights at 8 bits: the arithmetic, what becomes of a model, and the command that measures them."""

import math

import pandas as pd
import pytest
import torch
from torch import nn

import main
from helpers.evaluation.weights import MEASURES
from helpers.io.paths import ROOT
from helpers.models import fingerprint
from helpers.models.int8_linear import Int8Linear, round_rows, use_int8_weights
from helpers.models.loading import load_model
from helpers.models.presets import PRESETS
from helpers.policies import CachedModel


def test_rows_are_rounded_to_integers_of_their_own_scale():
    torch.manual_seed(0)
    x = torch.randn(6, 50) * torch.logspace(-3, 3, 6)[:, None]
    x[4] = 0
    codes, scales = round_rows(x)
    assert codes.dtype == torch.int8
    assert torch.allclose(scales, x.abs().amax(-1) / 127)
    assert ((codes * scales[:, None] - x).abs() <= scales[:, None] * 0.5001).all()
    assert codes[[0, 1, 2, 3, 5]].abs().amax(-1).tolist() == [127] * 5
    x[1, 3], x[2, 5] = math.nan, math.inf
    assert round_rows(x)[1].isnan().tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 5, 96)])
def test_a_layer_multiplies_what_was_rounded(bias, shape):
    torch.manual_seed(1)
    linear = nn.Linear(96, 33, bias=bias)
    layer, x = Int8Linear(linear), torch.randn(shape)
    codes, scales = round_rows(x.reshape(-1, 96))
    weight = layer.weight.double() * layer.scale[:, None].double()
    expected = (codes.double() * scales[:, None]) @ weight.T + (linear.bias.double() if bias else 0)
    assert torch.allclose(layer(x).double().reshape(-1, 33), expected, rtol=1e-5, atol=1e-6)
    assert layer(x).shape == (*shape[:-1], 33)
    assert (layer.weight.float() * layer.scale[:, None] - linear.weight).abs().max() <= layer.scale.max() * 0.51
    assert torch.nn.functional.cosine_similarity(layer(x).flatten(), linear(x).flatten(), dim=0) > 0.999


def test_a_loaded_model_keeps_its_weights_at_8_bits_and_is_another_one():
    source = PRESETS["embedded"].model
    full, tokenizer = load_model(source, quiet=True)
    int8, _ = load_model(source, quiet=True, weights="int8")
    layers = [module for module in int8.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 6 * 7 + 1
    assert not any(isinstance(module, nn.Linear) for module in int8.modules())
    assert int8.get_output_embeddings() is layers[-1]
    assert fingerprint(full) != fingerprint(int8)
    ids = tokenizer("Once upon a time there was a goose who", return_tensors="pt")["input_ids"]
    logits = [CachedModel(model).read(ids)[0].log_softmax(-1) for model in (full, int8)]
    kl = (logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean()
    assert 1e-6 < kl < 0.02
    step = CachedModel(int8)
    step.read(ids[:, :-1])
    assert torch.allclose(step.read(ids[:, -1:])[0, -1].log_softmax(-1), logits[1][-1], atol=1e-3)


def test_only_known_weights_on_the_cpu():
    with pytest.raises(ValueError, match="weights must be None or 'int8', got 'int4'"):
        load_model(PRESETS["embedded"].model, quiet=True, weights="int4")
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    model.device = torch.device("meta")
    with pytest.raises(ValueError, match="is for models on the CPU, and this one is on meta"):
        use_int8_weights(model)


def test_the_command_measures_cost_and_gain(tmp_path, capsys):
    stories, out = str(ROOT / "data" / "samples" / "stories.jsonl"), tmp_path / "weights.csv"
    options = ["--texts", stories, "--items", stories, "--count", "4", "--rows", "2", "--length", "64"]
    assert main.main(["weights", *options, "--out", str(out)]) == 0
    table = pd.read_csv(out).set_index("measure")
    assert table.index.tolist() == list(MEASURES)
    assert (table["low"] <= table["value"]).all()
    assert (table["value"] <= table["high"]).all()
    assert 0 < table.loc["kl", "value"] < 0.02
    assert table.loc["acc change", "n"] == 4
    assert "step time ratio" in capsys.readouterr().out
