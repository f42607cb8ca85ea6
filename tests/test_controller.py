"""The controller's networks: losses by hand, what they can learn, files, and the policy made of them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_ids, tiny_model
from safetensors.torch import load_file, save_file

from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.plan import Demotion, Step
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.driver import PolicyDriver
from helpers.policies.features import TokenFeatures
from helpers.policies.learned import (
    COMMIT_FEATURES,
    IMITATION_FEATURES,
    LearnedController,
    LearnedSchedule,
    LearnedWidths,
    settle_inputs,
)
from helpers.policies.network import Network
from helpers.policies.rules import EntropyRule
from helpers.training.allocation import rate_distortion
from helpers.training.commit import LossWeights, commit_loss, save_commit, train_commit
from helpers.training.controllers import write_controller_card
from helpers.training.cross_validation import cross_fit, held_out, shuffled_drops
from helpers.training.fitting import split_texts
from helpers.training.settle import train_settle


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    """Twelve texts of made-up features whose label is the rule's and whose costs fall with width."""
    rng = np.random.default_rng(0)
    rows = 1200
    data = pd.DataFrame({name: rng.normal(size=rows) for name in COMMIT_FEATURES})
    data["entropy"] = rng.uniform(0, 8, rows)
    data["text_id"] = np.repeat(np.arange(12), rows // 12)
    data["token_id"] = rng.integers(3, 97, rows)
    entropy = TokenFeatures(entropy=torch.tensor(data["entropy"].to_numpy())[None])
    data["kv_bits"] = EntropyRule().widths(entropy, 1, rows)[0].numpy()
    worth = np.exp(data["key_error"])
    for bits in (2, 4, 8, 16):
        data[f"cost_{bits}"] = worth * 4.0 ** (2 - bits)
    data["optimal_bits"] = np.where(worth > 1, 8, 2)
    return data


@pytest.fixture(scope="module")
def folder(table, tmp_path_factory):
    path = tmp_path_factory.mktemp("controllers")
    network, _ = train_commit(table, hidden=(16, 16), epochs=30)
    save_commit(network, path, "imitation", table, {"label": "kv_bits", "model": "made up"})
    network, _ = train_commit(table, COMMIT_FEATURES, "optimal_bits", hidden=(16,), epochs=10)
    save_commit(network, path, "commit", table, {"label": "optimal_bits", "model": "made up"})
    inputs, damage, texts = settling(400)
    network, _ = train_settle(inputs, damage, texts, hidden=(16,), epochs=10)
    network.save(path, "settle", {"label": "damage", "model": "made up"})
    return path


def settling(blocks: int, block: int = 8):
    """Blocks whose damage is received attention times value error, with noise as heavy as that of two draws."""
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, 1, blocks * block)
    received, key, value = (torch.rand(shape, generator=generator).exp().sub(0.9) for _ in range(3))
    inputs = settle_inputs(Demotion(range(1), 1, 0, block, key, value, received))[0, 0, 0].unflatten(0, (blocks, block))
    noise = torch.randn(2, blocks, block, generator=generator).square().mean(0)
    damage = (received * value)[0, 0, 0].unflatten(0, (blocks, block)) * noise
    return inputs, damage, np.repeat(np.arange(10), blocks // 10)


def test_loss_by_hand():
    outputs = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    quality = torch.tensor([[1.0, 0.5, 0.1, 0.0]])
    parts = np.log(4), (2 + 4 + 8 + 16) / 4 / 16, 1.6 / 4
    for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 2.0, 3.0)):
        loss = commit_loss(outputs, torch.tensor([2]), quality, LossWeights(*weights)).item()
        assert loss == pytest.approx(sum(w * p for w, p in zip(weights, parts, strict=True)), rel=1e-5)
    for bad in ((0, 0, 0), (-1, 1, 1), (np.nan, 1, 1)):
        with pytest.raises(ValueError, match="loss weights must be non-negative"):
            LossWeights(*bad)


def test_the_rule_can_be_learned(table):
    folds = cross_fit(table, folds=3, hidden=(32, 32), epochs=60)
    probabilities = held_out(table, folds)
    chosen = np.array([2, 4, 8, 16])[probabilities.argmax(1)]
    assert (chosen == table.kv_bits).mean() > 0.93
    assert probabilities.sum(1) == pytest.approx(np.ones(len(table)))
    drops = shuffled_drops(table, folds, "kv_bits").set_index("feature")
    assert drops["drop"]["entropy"] > 40
    assert abs(drops["drop"]["rarity"]) < 8


def test_cost_and_quality_pull_the_widths(table):
    settings = {"features": COMMIT_FEATURES, "label": "optimal_bits", "hidden": (16,), "epochs": 100}
    cheap, _ = train_commit(table, weights=LossWeights(0, 1, 0), **settings)
    fine, _ = train_commit(table, weights=LossWeights(0, 0, 1), **settings)
    inputs = torch.tensor(table[list(COMMIT_FEATURES)].to_numpy(np.float32))
    assert (cheap(inputs).argmax(-1) == 0).float().mean() > 0.95
    assert (fine(inputs).argmax(-1) == 0).float().mean() < 0.05


def test_texts_are_never_split(table):
    ids = table.text_id.to_numpy()
    held = split_texts(ids, 0.25, seed=3)
    assert len(np.unique(ids[held])) == 3
    assert not set(ids[held]) & set(ids[~held])
    with pytest.raises(ValueError, match="two texts or more, got 1"):
        split_texts(np.zeros(5), 0.5, 0)


def test_same_seed_same_network(table):
    one, two, other = (train_commit(table, hidden=(8,), epochs=3, seed=s)[0].layers.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_settle_network_finds_what_does_damage():
    inputs, damage, texts = settling(1000)
    network, history = train_settle(inputs, damage, texts, hidden=(32, 32), epochs=20)
    held = torch.tensor(split_texts(texts, 0.2, 0))
    scores = network(inputs[held])[..., 0]
    generator = torch.Generator().manual_seed(1)
    truth = inputs[held][..., 0] + inputs[held][..., 2]  # log received + log value error, up to the block's mean
    blind = torch.rand(scores.shape, generator=generator)
    agreement = (scores.topk(2).indices.sort().values == truth.topk(2).indices.sort().values).float().mean()
    chance = (blind.topk(2).indices.sort().values == truth.topk(2).indices.sort().values).float().mean()
    assert agreement > 0.7 > 2 * chance
    assert history.validation[history.best] == min(history.validation)


def test_missing_columns_are_named(table):
    with pytest.raises(ValueError, match=r"lacks column\(s\) rarity, cost_2"):
        train_commit(table.drop(columns=["rarity", "cost_2"]), weights=LossWeights(1, 0, 1))


def test_files_hold_everything(folder, table):
    network, about = Network.load(folder, "imitation", IMITATION_FEATURES, 4)
    again = LearnedController.load(folder, "imitation")
    inputs = torch.tensor(table[list(IMITATION_FEATURES)].to_numpy(np.float32))
    features = TokenFeatures(**{name: inputs[None, :, i] for i, name in enumerate(IMITATION_FEATURES)})
    widths = again.widths(features, 1, len(table))[0]
    assert torch.equal(widths, torch.tensor([2, 4, 8, 16])[network(inputs).argmax(-1)])
    assert (widths.numpy() == table.kv_bits).mean() > 0.75
    assert about["label"] == "kv_bits"
    assert again.start_counts.total == len(table)
    write_controller_card(folder)
    card = " ".join((folder / "README.md").read_text().split())  # columns are padded
    assert "| `imitation` | entropy, rarity, attn_var | 16 x 16 | kv_bits | made up |" in card


def test_a_target_average_is_met_on_the_training_texts(folder, table):
    controller = LearnedController.load(folder, "imitation")
    features = TokenFeatures(
        **{name: torch.tensor(table[name].to_numpy(np.float32))[None] for name in IMITATION_FEATURES}
    )
    for average in (3.0, 5.1, 8.0):
        widths = controller.at_average(average).widths(features, 1, len(table))
        assert widths.double().mean().item() == pytest.approx(average, abs=0.35)
    with pytest.raises(ValueError, match=r"average must lie between .* bits, got 1.5"):
        controller.at_average(1.5)


def edit(folder, tmp_path, name, change_tensors=None, change_about=None):
    tensors = load_file(folder / f"{name}.safetensors")
    about = json.loads((folder / f"{name}.json").read_text())
    tensors = change_tensors(tensors) if change_tensors else tensors
    about = change_about(about) if change_about else about
    save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / f"{name}.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        (None, lambda a: {**a, "features": ["entropy", "rarity", "colour"]}, r"unknown feature\(s\) \['colour'\]"),
        (None, lambda a: {**a, "hidden": [16, 17]}, "do not fit its description"),
        (None, lambda a: {k: v for k, v in a.items() if k != "hidden"}, "cannot be read"),
        (lambda t: {k: v for k, v in t.items() if k != "mean"}, None, "do not fit its description"),
        (lambda t: {**t, "mean": torch.zeros(7)}, None, r"mean is \['F32', \[7\]\], expected"),
        (lambda t: {**t, "scale": torch.full((3,), torch.nan)}, None, "NaN or infinity"),
    ],
)
def test_foreign_files_are_refused(folder, tmp_path, tensors, about, message):
    edit(folder, tmp_path, "imitation", tensors, about)
    with pytest.raises(ValueError, match=message):
        LearnedController.load(tmp_path, "imitation")


def test_broken_and_absent_files_are_refused(folder, tmp_path):
    edit(folder, tmp_path, "imitation")
    path = tmp_path / "imitation.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        LearnedController.load(tmp_path, "imitation")
    with pytest.raises(FileNotFoundError, match=r"run notebook 02_controller_training\.ipynb first"):
        LearnedController.load(tmp_path, "settle")


def test_commit_controller_in_a_driver(folder):
    """What the driver commits is what the network says of the features that the driver observed."""
    model, ids = tiny_model("llama"), random_ids(2, 56)
    controller = LearnedController.load(folder, "commit")
    assert set(controller.needs) == set(COMMIT_FEATURES)
    seen = []

    class Spy(LearnedWidths):
        def widths(self, features, batch, tokens):
            seen.append(features)
            return super().widths(features, batch, tokens)

    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, Spy(controller.network))
    for _ in score_blocks(CachedModel(model, cache, driver), ids, 8):
        pass
    committed = torch.cat(driver.chosen, 1)
    assert committed.shape == (2, 56)
    assert torch.equal(cache.token_bits()[:, 4:56].int(), committed[:, 4:].int())
    surprisal = torch.cat([f.surprisal for f in seen], 1)
    log_p = model(input_ids=ids).logits.log_softmax(-1)
    # The first block is read in full precision, so its surprisal is the model's own.
    expected = -log_p[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    assert surprisal[:, 0].tolist() == [0, 0]
    assert torch.allclose(surprisal[:, 1:8], expected[:, :7], atol=1e-4)
    errors = torch.cat([f.key_error for f in seen], 1)
    assert ((errors > 0) & (errors < 1)).all()


def test_settle_controller_in_a_driver(folder):
    model, ids = tiny_model("llama"), random_ids(2, 80)
    controller = LearnedController.load(folder, "settle", 8, (Step(2, 4), Step(4, 2, keep=0.25)))
    assert controller.name == "8-4-2 @2,4, best 25% by learned score"
    cache = PackedKVCache(model.config, block=8, sinks=0)
    driver = PolicyDriver(model, cache, controller)
    for _ in score_blocks(CachedModel(model, cache, driver), ids, 8):
        pass
    assert cache.token_bits()[:, :48].mean().item() == pytest.approx(2.5)
    out = model.generate(  # it reads no logits, so that a plain generate() is enough
        input_ids=ids[:1, :40], cache=(fresh := PackedKVCache(model.config, block=8)), max_new_tokens=30,
        logits_processor=[PolicyDriver(model, fresh, controller)], do_sample=False,
    )  # fmt: skip
    assert out.shape == (1, 70)
    assert fresh.code_bits() < 8


def test_the_two_kinds_of_controllers_and_their_old_name(folder):
    assert isinstance(LearnedController.load(folder), LearnedSchedule)
    assert isinstance(LearnedController.load(folder, "imitation"), LearnedWidths)
    with pytest.raises(ValueError, match="a schedule needs one step or more"):
        LearnedController.load(folder, steps=())
    with pytest.raises(ValueError, match="'seed' is now called 'imitation'"):
        LearnedController.load(folder, "seed")


def test_rate_distortion_of_blind_and_knowing_widths(table):
    costs = table[[f"cost_{b}" for b in (2, 4, 8, 16)]].to_numpy()
    best = rate_distortion(costs, averages=(3, 4, 6))
    assert best.bits.tolist() == pytest.approx([3, 4, 6], abs=0.05)
    assert (best.cost <= best.random_cost).all()
    assert (best.cost.diff().dropna() < 0).all()
