"""A text that was read, saved and read on: nothing is lost, and no file of anything else is taken for it."""

import json
import os

import pytest
import torch
from conftest import left_padded, random_ids, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.cache import PackedKVCache, Step
from helpers.policies import (
    AgeSchedule,
    CachedModel,
    EntropyRule,
    FixedBits,
    PolicyDriver,
    TokenCounts,
    load_cache,
    save_cache,
)
from helpers.policies.schedules import MIDDLE_SCHEDULE


class Rarest(FixedBits):
    """Reads everything that a driver has to remember."""

    needs = ("entropy", "surprisal", "rarity", "key_error")

    def widths(self, features, batch, tokens):
        return torch.where(features.rarity + features.surprisal + features.key_error > 6, 8, 4)


POLICIES = {
    "none": None,
    "rule": EntropyRule((3.9, 4.1, 4.25)),
    "rarity": Rarest(4),
    "schedule": AgeSchedule(*MIDDLE_SCHEDULE),
    "two steps": AgeSchedule(8, (Step(1, 4), Step(3, 2, keep=0.5)), ranking="attention"),
}


def reader(model, policy: str = "none", **settings) -> CachedModel:
    settings = {"block": 8, "bits": 4 if policy == "none" else None, **settings}
    cache = PackedKVCache(model.config, **settings)
    if policy == "none":
        return CachedModel(model, cache)
    driver = PolicyDriver(model, cache, POLICIES[policy], TokenCounts({3: 5, 7: 2}))
    return CachedModel(model, cache, driver)


def read_on(cached: CachedModel, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([cached.read(ids[:, at : at + 1]) for at in range(ids.shape[1])], dim=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text", "gemma2", "bamba", "lfm2"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_saved_text_goes_on_as_if_nothing_had_happened(tmp_path, family, policy, rows):
    model = tiny_model(family)
    one = reader(model, policy)
    one.read(random_ids(rows, 75))
    read_on(one, random_ids(rows, 14, seed=1))
    path = save_cache(one, tmp_path / "text.safetensors")
    two = reader(model, policy)
    load_cache(two, path)
    assert two.length == one.length == 89
    assert two.cache.bits_per_element() == one.cache.bits_per_element()
    assert torch.equal(two.cache.token_bits(), one.cache.token_bits())
    more = random_ids(rows, 40, seed=2)
    expected, actual = read_on(one, more), read_on(two, more)
    assert torch.equal(actual[:, :2], expected[:, :2])
    assert torch.allclose(actual, expected, atol=1e-3)  # new blocks go to other segments, which are added up otherwise
    assert torch.equal(two.cache.token_bits(), one.cache.token_bits())
    if policy != "none":
        assert torch.equal(two.driver.widths_so_far(), one.driver.widths_so_far())
        assert torch.equal(two.driver.text, one.driver.text)
        if not two.cache.other_layers:
            two.take_back(20, torch.zeros(rows, 97))
            assert two.length == 109
    assert path.stat().st_size < 1.2 * one.cache.stored_bytes() + 40_000


def test_padded_rows_before_the_first_commit_are_kept(tmp_path):
    model = tiny_model("llama")
    one, two = (reader(model, "rule") for _ in range(2))
    batch = left_padded([18, 7])
    one.driver.prefill(batch)
    assert one.cache.visible is not None
    load_cache(two, save_cache(one, tmp_path / "text.safetensors"))
    assert torch.equal(two.cache.visible, one.cache.visible)


def test_an_empty_cache_is_saved_and_loaded(tmp_path):
    model = tiny_model("llama")
    two = reader(model)
    two.read(random_ids(1, 30))
    load_cache(two, save_cache(reader(model), tmp_path / "text.safetensors"))
    assert two.length == 0
    assert two.read(random_ids(1, 30)).isfinite().all()


def rewritten(path, change) -> None:
    """A file whose JSON `change` has changed."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    tensors = load_file(path)
    change(about, tensors)
    save_file(tensors, path, metadata={"about": json.dumps(about)})


def flip_a_bit(path, from_the_end: int) -> None:
    content = bytearray(path.read_bytes())
    content[-from_the_end] ^= 8
    path.write_bytes(content)


DAMAGES = {
    "cut short": (lambda path: os.truncate(path, path.stat().st_size // 2), "is no file of a saved cache"),
    "no such file": (lambda path: path.write_bytes(b"nothing"), "is no file of a saved cache"),
    "a code": (lambda path: flip_a_bit(path, 9), "is damaged"),
    "no word of it": (lambda path: save_file({"x": torch.zeros(1)}, path), "is no file of a saved cache"),
    "another format": (lambda path: rewritten(path, lambda about, _: about.update(format=7)), "has format 7"),
    "a part is missing": (
        lambda path: rewritten(path, lambda about, _: about["cache"]["packed"].pop()),
        "is no file of such a cache",
    ),
    "lengths that differ": (
        lambda path: rewritten(path, lambda about, _: about["cache"]["packed"][1].update(packed_length=3)),
        "is no file of such a cache",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_leaves_the_cache_empty_and_of_use(tmp_path, damage):
    model = tiny_model("llama")
    one = reader(model)
    ids = random_ids(1, 60)
    expected = one.read(ids)
    path = save_cache(one, tmp_path / "text.safetensors")
    spoil, message = DAMAGES[damage]
    spoil(path)
    two = reader(model)
    two.read(random_ids(1, 20, seed=3))
    with pytest.raises(ValueError, match=message):
        load_cache(two, path)
    assert two.length == 0
    assert torch.equal(two.read(ids), expected)


OTHERS = {
    "sinks": ({"sinks": 2}, "sinks must be 2 as in this cache, and the file has 4"),
    "block": ({"block": 16}, "block must be 16"),
    "bits": ({"bits": (8, 4)}, r"bits must be \[8, 4\] as in this cache, and the file has \[4, 4\]"),
    "quantizer": ({"quantizer": "minmax"}, "quantizer must be 'minmax'"),
    "stretch": ({"stretch": False}, "stretch must be False"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused_by_name(tmp_path, other):
    model = tiny_model("llama")
    one = reader(model)
    one.read(random_ids(1, 40))
    path = save_cache(one, tmp_path / "text.safetensors")
    settings, message = OTHERS[other]
    with pytest.raises(ValueError, match=message):
        load_cache(reader(model, **settings), path)


def test_another_model_policy_or_place_is_refused(tmp_path):
    model = tiny_model("llama")
    one = reader(model, "rule")
    one.read(random_ids(1, 40))
    path = save_cache(one, tmp_path / "text.safetensors")
    for other in (tiny_model("llama", seed=1), tiny_model("llama", dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="was saved from another model"):
            load_cache(reader(other, "rule"), path)
    with pytest.raises(ValueError, match="policy must be"):
        load_cache(reader(model, "rarity"), path)
    with pytest.raises(FileNotFoundError, match="save_cache writes such a file"):
        load_cache(one, tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="only a PackedKVCache can be saved and loaded, got DynamicCache"):
        save_cache(CachedModel(model), path)


def test_a_save_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    model = tiny_model("llama")
    one = reader(model)
    one.read(random_ids(1, 40))
    path = save_cache(one, tmp_path / "text.safetensors")
    before = path.read_bytes()

    def fails(tensors, temporary, metadata):
        temporary.write_bytes(b"half of")
        raise OSError("no")

    monkeypatch.setattr("helpers.policies.saving.save_file", fails)
    one.read(random_ids(1, 10))
    with pytest.raises(OSError, match="no"):
        save_cache(one, path)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["text.safetensors"]
