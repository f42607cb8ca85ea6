"""The quality script: its measures, and the bars on a real model where there is one."""

import numpy as np
import pytest
import torch
from conftest import random_ids, tiny_model
from transformers import DynamicCache

from helpers.evaluation.bootstrap import bootstrap_mean
from helpers.evaluation.fixed_widths import quality_table, sample_sequences
from helpers.evaluation.methods import PackedMethod
from helpers.evaluation.metrics import kl_divergence, next_token_hits
from helpers.evaluation.quality import full_precision_accuracy, measure_method
from helpers.models.loading import load_model
from helpers.models.splits import split_holdout
from helpers.models.stories import read_stories
from helpers.models.tokens import pack_tokens
from helpers.policies.rules import FixedBits


def test_kl_by_hand():
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    expected = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert kl_divergence(p.log(), q.log()).item() == pytest.approx(expected)
    assert kl_divergence(p.log(), p.log() + 3).item() == pytest.approx(0, abs=1e-7)


def test_hits():
    logits = torch.tensor([[[0.1, 0.9], [0.8, 0.2]]])
    assert next_token_hits(logits, torch.tensor([[1, 1]])).tolist() == [[True, False]]


def test_bootstrap_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        mean, low, high = bootstrap_mean(rng.normal(1.0, 2.0, size=60), resamples=400, seed=trial)
        assert low < mean < high
        covered += low <= 1.0 <= high
    assert 180 <= covered <= 199
    assert bootstrap_mean(np.arange(10)) == bootstrap_mean(np.arange(10))
    with pytest.raises(ValueError, match="one number a text"):
        bootstrap_mean([])


def test_a_cache_that_keeps_everything_loses_nothing():
    model, ids = tiny_model("llama"), random_ids(4, 64)
    measured = measure_method(model, ids, PackedMethod(FixedBits(16), 8), first=8, batch=3)
    assert measured["kl"].shape == (4,)
    assert measured["kl"].max() < 1e-4
    assert np.abs(measured["accuracy"] - full_precision_accuracy(model, ids, 8)).max() < 0.05
    table = quality_table(
        model, ids, [PackedMethod(FixedBits(b), 8, q) for b in (4, 2) for q in ("rotated", "minmax")], "random"
    )
    assert (table.kl_low < table.kl).all()
    assert (table.kl < table.kl_high).all()
    assert table.kl[:2].max() < table.kl[2:].min()
    assert table.code_bits.tolist() == pytest.approx([(52 * b + 12 * 16) / 64 for b in (4, 4, 2, 2)])


def test_sampling_is_seeded_and_is_the_models_own():
    model = tiny_model("llama")
    a, b, c = (sample_sequences(model, 6, 20, seed, batch=4) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert a.shape == (6, 20)
    assert (a[:, 0] == 1).all()
    many = sample_sequences(model, 3000, 2, batch=3000)[:, 1]
    with torch.no_grad():
        p = model(input_ids=torch.tensor([[1]]), cache=DynamicCache(config=model.config)).logits[0, -1].softmax(-1)
    assert torch.allclose(torch.bincount(many, minlength=97) / 3000, p, atol=0.03)


def test_quality_on_a_real_model(shared):
    """The bars of the quantizer on a tenth of the data of the committed table, with a margin for the smaller sample."""
    model, tokenizer = load_model(shared / "models/stories3M", device="cpu", quiet=True)
    sampled = sample_sequences(model, 24, 256, seed=0)
    kl = {
        (bits, block, quantizer): measure_method(model, sampled, PackedMethod(FixedBits(bits), block, quantizer))[
            "kl"
        ].mean()
        for bits, block, quantizer in ((4, 1, "rotated"), (4, 16, "rotated"), (2, 16, "rotated"), (4, 16, "minmax"))
    }
    assert kl[4, 1, "rotated"] < 0.044
    assert kl[4, 16, "rotated"] < 0.0132
    assert kl[2, 16, "rotated"] < 0.25
    assert kl[4, 16, "rotated"] < kl[4, 16, "minmax"]
    _, held_out = split_holdout(read_stories(shared / "data/tinystories_sample.txt"))
    packed = torch.tensor(pack_tokens(tokenizer(held_out, verbose=False)["input_ids"], 512))[:16]
    assert measure_method(model, packed, PackedMethod(FixedBits(4)), first=256)["kl"].mean() < 0.0242


def test_sixteen_bits_on_a_real_model(shared):
    model, tokenizer = load_model(shared / "models/stories3M", device="cpu", quiet=True)
    ids = torch.tensor([tokenizer("Once upon a time, there was a little girl named Lily.")["input_ids"]])
    from helpers.cache.kv_cache import PackedKVCache

    expected = model.generate(input_ids=ids, max_new_tokens=80, do_sample=False)
    for bits in (16, None):
        cache = PackedKVCache(model.config, bits=bits)
        out = model.generate(input_ids=ids, max_new_tokens=80, do_sample=False, cache=cache)
        assert torch.equal(out, expected)
