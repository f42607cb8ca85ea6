"""Costs of widths: exact ones against a run with the token replaced by hand, estimates against exact ones."""

import json

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model
from transformers import DynamicCache

from helpers.evaluation.metrics import kl_divergence, rank_correlation
from helpers.models.loading import load_model
from helpers.models.stories import load_stories
from helpers.policies.rules import EntropyRule
from helpers.training import costs as costs_module
from helpers.training.allocation import optimal_bits
from helpers.training.collection import collect
from helpers.training.costs import load_or_measure_costs
from helpers.training.exact import exact_costs
from helpers.training.fisher import fisher_costs, head_costs
from helpers.training.states import text_states


def replaced_by_hand(model, ids, at, bits, horizon):
    """Token `at` is put back as stored once it was read; the following tokens are then read over it."""
    row = torch.tensor([ids])
    full = DynamicCache(config=model.config)
    reference = model(input_ids=row, cache=full).logits[0]
    states = text_states(full, model.config)
    cache = DynamicCache(config=model.config)
    model(input_ids=row[:, : at + 1], cache=cache)
    for number, layer in enumerate(cache.layers):
        layer.keys[:, :, at] = states.stored(bits)[0][number][:, :, at]
        layer.values[:, :, at] = states.stored(bits)[1][number][:, :, at]
    stop = min(len(ids), at + 1 + horizon)
    logits = model(input_ids=row[:, at + 1 : stop], cache=cache).logits[0]
    return kl_divergence(reference[at + 1 : stop], logits).sum().item()


@torch.no_grad()
def test_exact_costs_are_those_of_a_token_replaced_by_hand(family):
    model = tiny_model(family, dtype=torch.float64)
    ids = random_ids(1, 50)[0].tolist()
    tokens = [0, 5, 20, 21, 40, 48, 49]
    costs = exact_costs(model, ids, tokens, (2, 4, 16), horizon=12, batch=7)
    expected = [[replaced_by_hand(model, ids, t, b, 12) for b in (2, 4, 16)] for t in tokens[:-1]]
    assert costs[:-1] == pytest.approx(np.array(expected), rel=1e-6, abs=1e-9)
    assert (costs[-1] == 0).all(), "nothing follows the last token"
    assert costs[:, 0].sum() > costs[:, 1].sum() > costs[:, 2].sum()


def test_the_estimate_ranks_tokens_as_the_exact_costs_do():
    model = tiny_model("llama")
    ids = random_ids(1, 96)[0].tolist()
    exact = exact_costs(model, ids, range(16, 90), (4, 8), horizon=64)
    estimate = fisher_costs(model, ids, (4, 8), samples=24)[16:90]
    for column in (0, 1):
        assert rank_correlation(exact[:, column], estimate[:, column]) > 0.8
    assert 0.5 < estimate[:, 1].sum() / exact[:, 1].sum() < 2.0


def test_estimate_on_a_real_model(shared):
    model, tokenizer = load_model(shared / "models/stories3M", quiet=True)
    stories = load_stories(str(shared / "data/tinystories_sample.txt"))[:2]
    exact, estimate = [], []
    for story in stories:
        ids = tokenizer(story)["input_ids"][:200]
        exact.append(exact_costs(model, ids, range(16, len(ids)), (4, 8)))
        estimate.append(fisher_costs(model, ids, (4, 8))[16:])
    exact, estimate = np.concatenate(exact), np.concatenate(estimate)
    assert rank_correlation(exact[:, 0], estimate[:, 0]) > 0.75
    assert rank_correlation(exact[:, 1], estimate[:, 1]) > 0.75


def test_head_costs_start_when_the_block_has_settled():
    model = tiny_model("llama")
    ids = random_ids(1, 96)[0].tolist()
    near, far = head_costs(model, ids, [((4, 4), (2, 2), 1), ((4, 4), (2, 2), 3)], block=8, samples=3, segment=16)
    assert near.shape == (2, 2, 96)
    # The last segment begins at 80; blocks of 8 settled one block later count if they end by 72.
    assert np.isfinite(near[:, :, :72]).all()
    assert np.isnan(near[:, :, 72:]).all()
    assert np.isnan(far[:, :, 56:]).all()
    assert (far[:, :, :56] <= near[:, :, :56] + 1e-12).all()
    assert (near[:, :, :72] >= 0).all()


def test_a_head_that_nobody_listens_to_costs_nothing():
    model = tiny_model("llama")
    projection = model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        projection[:, 2 * 32 :] = 0  # the query heads of the second KV head of the last layer
    (costs,) = head_costs(model, random_ids(1, 96)[0].tolist(), [((4, 4), (2, 2), 1)], block=8, samples=2, segment=16)
    assert np.nansum(costs[1, 1]) == 0
    assert np.nansum(costs[1, 0]) > 0


def test_optimal_bits_by_brute_force():
    rng = np.random.default_rng(0)
    costs = np.sort(rng.exponential(size=(4, 4)), axis=1)[:, ::-1]
    widths, price = optimal_bits(costs, 6.0)
    best = np.array([2, 4, 8, 16])[(costs + price * np.array([2, 4, 8, 16])).argmin(1)]
    assert widths.tolist() == best.tolist()
    # No other assignment that spends as few bits does less damage.
    spent, damage = widths.sum(), costs[np.arange(4), np.searchsorted([2, 4, 8, 16], widths)].sum()
    every = np.stack(np.meshgrid(*[range(4)] * 4), -1).reshape(-1, 4)
    bits = np.array([2, 4, 8, 16])[every].sum(1)
    damages = costs[np.arange(4), every].sum(1)
    assert damage <= damages[bits <= spent].min() + 1e-12


def test_optimal_bits_meet_the_average():
    costs = np.random.default_rng(1).exponential(size=(500, 1)) * np.array([1.0, 0.05, 0.002, 0.0])
    for average in (2.5, 4.0, 7.0):
        assert optimal_bits(costs, average)[0].mean() == pytest.approx(average, abs=0.05)


@pytest.mark.parametrize(
    ("costs", "average", "message"),
    [
        (np.zeros((3, 3)), 4, "costs must have shape"),
        (np.full((3, 4), np.nan), 4, "NaN or infinity"),
        (np.zeros((3, 4)), 1, "average must lie between 2 and 16 bits, got 1"),
    ],
)
def test_bad_costs_are_refused(costs, average, message):
    with pytest.raises(ValueError, match=message):
        optimal_bits(costs, average)


def test_short_texts_are_refused():
    with pytest.raises(ValueError, match="a text needs 16 tokens or more, got 9"):
        exact_costs(tiny_model("llama"), random_ids(1, 9)[0].tolist(), [3])


def test_costs_are_estimated_where_a_model_is_large(tmp_path, monkeypatch):
    model = tiny_model("llama")
    table = collect(
        model, [random_ids(1, 40, seed=seed)[0].tolist() for seed in range(2)], tmp_path / "t.csv", EntropyRule()
    )
    path = tmp_path / "costs.csv"
    measured, _ = load_or_measure_costs(model, table, path)
    assert json.loads(path.with_suffix(".json").read_text())["costs"] == "measured"
    monkeypatch.setattr(costs_module, "MOST_WEIGHTS", 1000)
    estimated, _ = load_or_measure_costs(model, table, path)
    assert json.loads(path.with_suffix(".json").read_text())["costs"] == "estimated (Fisher information)"
    for column in ("cost_2", "cost_4"):
        assert rank_correlation(measured[column].to_numpy(), estimated[column].to_numpy()) > 0.5
    again, _ = load_or_measure_costs(model, table, path, exact=True)
    assert again["cost_4"].tolist() == measured["cost_4"].tolist()
