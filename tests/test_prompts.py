"""Prompts are packed layer by layer: when, what is stored then, and what their own logits see."""

import copy

import pytest
import torch
from conftest import left_padded, random_ids, tiny_config, tiny_model
from test_kv_cache import feed, same_content
from transformers import DynamicCache

from helpers.cache.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.cache.layer import PackedLayer
from helpers.cache.plan import Plan, Step
from helpers.policies.cached_model import CachedModel
from helpers.policies.driver import PolicyDriver
from helpers.policies.learned import SETTLE_FEATURES, LearnedSchedule
from helpers.policies.network import Network
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits
from helpers.policies.schedules import COMPACT_SCHEDULE, QUALITY_SCHEDULE, AgeSchedule

BLOCK = 8
BATCHES = {"one": [100], "left-padded": [100, 41, 77]}


def learned():
    torch.manual_seed(3)
    network = Network.create(SETTLE_FEATURES, torch.randn(50, len(SETTLE_FEATURES)), (8,), 1)
    return LearnedSchedule(*QUALITY_SCHEDULE, network=network)


PLANNED = {
    "static": lambda: FixedBits(4),
    "schedule": lambda: AgeSchedule(*QUALITY_SCHEDULE),
    "keys apart": lambda: AgeSchedule(*COMPACT_SCHEDULE, ranking="attention"),
    "random schedule": lambda: AgeSchedule(*QUALITY_SCHEDULE, ranking="random"),
    "learned": learned,
}
HELD = {"rule": lambda: EntropyRule((3.9, 4.1, 4.25)), "random": RandomBits}
POLICIES = PLANNED | HELD


def cache_for(model, policy, sinks: int = 4) -> PackedKVCache:
    cache = PackedKVCache(model.config, block=BLOCK, sinks=sinks)
    PolicyDriver(model, cache, policy)
    return cache


def read_together(model, policy, ids, mask=None, chunk=None) -> PackedKVCache:
    """A cache that commits all layers together, after each forward."""
    cache, plan = cache_for(model, policy), policy.plan
    for start in range(0, ids.shape[1], chunk or ids.shape[1]):
        stop = start + (chunk or ids.shape[1])
        cache.plan, cache.holds = None, False
        feed(model, cache, ids[:, start:stop], mask)
        cache.plan = plan
        cache.commit_ready()
    return cache


@pytest.fixture
def updates(monkeypatch):
    """At each update of a layer: its number, and packed tokens and slots of the tail of each layer before it."""
    seen, update = [], PackedLayer.update

    def watched(layer, *states):
        result = update(layer, *states)
        before = layer.cache.layers[: layer.layer_idx]
        seen.append((layer.layer_idx, [(x.packed_length, x.keys.shape[2], x.values.shape[2]) for x in before]))
        return result

    monkeypatch.setattr(PackedLayer, "update", watched)
    return seen


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "sdpa"])
def test_a_layer_is_packed_once_the_next_is_updated(packed, policy, updates):
    made = POLICIES[policy]()
    if made.needs_received and not packed:
        pytest.skip("received attention needs packed attention")
    model = tiny_model("llama", packed=packed, layers=3)
    cache = cache_for(model, made)
    feed(model, cache, random_ids(2, 100))
    assert updates == [(layer, [(96, BLOCK, BLOCK)] * layer) for layer in range(3)]
    assert cache.undecided == (96 if policy in HELD else 0)
    assert (cache.committed, cache.held) == ((0, 96) if policy in HELD else (96, 0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_a_prompt_read_at_once_sees_full_precision(family, policy, dtype, lengths):
    model, batch = tiny_model(family, dtype=dtype, layers=3), left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = feed(model, DynamicCache(config=model.config), ids, mask)
    logits = feed(model, cache_for(model, POLICIES[policy]()), ids, mask)
    if dtype == torch.float64:
        assert torch.equal(logits, expected)
    else:
        assert torch.allclose(logits, expected, atol=1e-6)


@pytest.mark.parametrize("policy", PLANNED)
@pytest.mark.parametrize("chunk", [None, 24])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_layer_by_layer_stores_what_all_layers_together_store(policy, chunk, lengths):
    model, batch = tiny_model("llama", dtype=torch.float64, layers=3), left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = cache_for(model, PLANNED[policy]())
    feed(model, cache, ids, mask, chunk)
    cache.commit_ready()
    together = read_together(model, PLANNED[policy](), ids, mask, chunk)
    assert cache.committed == 96
    # Segments may divide the same tokens differently, and attention then sums in another order.
    same_content(cache, together, atol=1e-10)
    assert torch.allclose(feed(model, cache, ids[:, :20]), feed(model, together, ids[:, :20]), atol=1e-10)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_held_tokens_are_requantized_from_8_bits(bits):
    model, ids = tiny_model("llama"), random_ids(2, 60)
    cache = cache_for(model, RandomBits(), sinks=0)
    feed(model, cache, ids)
    assert cache.undecided == cache.held == 56
    cache.commit(bits, 24)
    assert (cache.committed, cache.held) == (24, 32)
    cache.commit(torch.full((2, 32), bits))
    assert (cache.committed, cache.held) == (56, 0)
    assert cache.token_bits()[:, :56].unique().tolist() == [min(bits, 8)]
    twin = PackedKVCache(model.config, block=BLOCK, sinks=0)
    feed(model, twin, ids)
    twin.commit(8, pending=True)
    twin.settle(8, min(bits, 8), blocks=7)
    for mine, other in zip((cache.states(i).dense() for i in range(2)), (twin.states(i).dense() for i in range(2))):
        assert all(map(torch.equal, mine, other))


def test_widths_of_held_tokens_are_those_that_the_policy_chose():
    model, batch = tiny_model("llama"), left_padded([60, 43])
    cache = PackedKVCache(model.config, block=BLOCK, sinks=0)
    driver = PolicyDriver(model, cache, RandomBits(seed=4))
    driver.prefill({**batch, "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 1), value=5),
                    "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)})  # fmt: skip
    chosen = RandomBits(seed=4).widths(None, 2, 56)
    assert cache.token_bits()[:, :56].tolist() == chosen.clamp(max=8).tolist()
    assert torch.equal(driver.widths_so_far()[:, :56], chosen.clamp(max=8))


@pytest.mark.parametrize("policy", PLANNED)
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_generate_reads_prompts_in_chunks(policy, lengths):
    model, batch = tiny_model("llama", layers=3), left_padded(lengths)
    settings = {"max_new_tokens": 12, "do_sample": False}
    cache = cache_for(model, PLANNED[policy]())
    out = model.generate(**batch, **settings, cache=cache, prefill_chunk_size=40)
    assert out.shape == (len(lengths), 112)
    assert (cache.get_seq_length(), cache.committed) == (111, 104)
    by_hand, ids, mask = cache_for(model, PLANNED[policy]()), batch["input_ids"], batch["attention_mask"]
    logits = feed(model, by_hand, ids, mask, chunk=40)
    for _ in range(11):
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        logits = feed(model, by_hand, ids[:, -1:], mask)
    assert torch.equal(out[:, :-1], ids)
    same_content(cache, by_hand)


def test_a_prompt_read_in_chunks_sees_its_earlier_chunks_packed():
    model, ids = tiny_model("llama", dtype=torch.float64), random_ids(1, 96)
    full = feed(model, DynamicCache(config=model.config), ids)
    chunked = feed(model, PackedKVCache(model.config, bits=4, block=BLOCK), ids, chunk=48)
    assert torch.equal(chunked[:, :48], full[:, :48])
    twin = PackedKVCache(model.config, block=BLOCK)
    feed(model, twin, ids[:, :48])
    twin.commit(4)
    assert torch.allclose(chunked[:, 48:], feed(model, twin, ids[:, 48:]), atol=1e-10)
    assert (chunked - full)[:, 48:].abs().mean() > 1e-3


@pytest.mark.parametrize("policy", ["schedule", "rule"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("before", [0, 40])
def test_an_interrupted_forward_is_found_out_until_the_reset(policy, layer, before):
    model = tiny_model("llama", layers=3)
    cache, ids = cache_for(model, POLICIES[policy]()), random_ids(1, 100)
    if before:
        feed(model, cache, ids[:, :before])

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[layer].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        feed(model, cache, ids)
    hook.remove()
    if layer < 2:
        for use in (
            lambda: feed(model, cache, ids[:, :1]),
            lambda: cache.commit(4),
            lambda: cache.crop(-3),
            lambda: cache.batch_repeat_interleave(2),
        ):
            with pytest.raises(ValueError, match="a forward was interrupted"):
                use()
        assert cache.peak_bytes() >= cache.stored_bytes() > 0
    else:  # every layer has read all of it
        feed(model, cache, ids[:, :1])
        assert cache.get_seq_length() == before + 101
    cache.reset()
    again = feed(model, cache, ids)
    assert torch.equal(again, feed(model, cache_for(model, POLICIES[policy]()), ids))


def check_goes_on(model, cache, rows):
    """Packed attention over what is left is attention over the same, dequantized."""
    twin, more = copy.deepcopy(cache), random_ids(rows, 5, 9)
    twin.config = copy.deepcopy(model.config)
    packed = feed(model, cache, more)
    model.set_attn_implementation("sdpa")
    twin.config._attn_implementation = "sdpa"
    assert torch.allclose(packed, feed(model, twin, more), atol=1e-5)
    model.set_attn_implementation(PACKED_ATTENTION)


@pytest.mark.parametrize("policy", ["static", "schedule"])
@pytest.mark.parametrize("removed", [2, 4, 5, 30, 75, 100])
def test_crop_right_after_a_prompt(policy, removed):
    model, ids = tiny_model("llama"), random_ids(2, 100)
    cache = cache_for(model, PLANNED[policy]())
    feed(model, cache, ids)
    together = read_together(model, PLANNED[policy](), ids)
    for each in (cache, together):
        each.crop(-removed)
    same_content(cache, together)
    check_goes_on(model, cache, 2)


@pytest.mark.parametrize("removed", [2, 4, 12, 53, 90, 100])
def test_crop_into_held_tokens(removed):
    model, ids = tiny_model("llama"), random_ids(2, 100)
    cache = cache_for(model, RandomBits(), sinks=0)
    cache.record_errors = True
    feed(model, cache, ids)
    cache.crop(-removed)
    left = 100 - removed
    assert (cache.get_seq_length(), cache.held, cache.committed) == (left, min(96, left), 0)
    before = [cache.states(i).dense() for i in range(2)] if left else []
    feed(model, cache, ids[:, :10])
    for number, states in enumerate(before):
        for now, then in zip(cache.states(number).dense(), states, strict=True):
            assert torch.allclose(now[:, :, :left], then, atol=0.05)
    ready = cache.undecided
    if ready:
        assert cache.tail_errors(ready)[0].shape == (2, ready)
        cache.commit(torch.full((2, ready), 4))
        assert (cache.committed, cache.held) == (ready, 0)
        assert (cache.token_bits()[:, :ready] == 4).all()
    check_goes_on(model, cache, 2)


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "offload"])
@pytest.mark.parametrize("policy", ["static", "schedule", "random"])
def test_rows_and_places_change_right_after_a_prompt(policy, operation):
    model, batch = tiny_model("llama"), left_padded([100, 70, 83])
    rows = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1], "offload": [0, 1, 2]}[operation]
    caches = []
    for index in ([0, 1, 2], rows):
        cache = cache_for(model, POLICIES[policy]())
        feed(model, cache, batch["input_ids"][index], batch["attention_mask"][index])
        caches.append(cache)
    cache = caches[0]
    if operation == "reorder":
        cache.reorder_cache(torch.tensor(rows))
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
    elif operation == "select":
        cache.batch_select_indices(torch.tensor(rows))
    else:
        for layer in cache.layers:
            layer.offload()
        for layer in cache.layers:
            layer.prefetch()
    for each in caches:
        each.end_forward()
        if each.undecided:
            each.commit(4)
    same_content(*caches)


@pytest.mark.parametrize("plan", [Plan(4), Plan(8, (Step(2, 4), Step(4, 2)))], ids=["static", "schedule"])
@pytest.mark.parametrize("heads", [(2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 1, 1)])
def test_layers_of_different_shapes_lie_in_stores_of_their_own(heads, plan):
    config = tiny_config("llama", layers=3)
    config._attn_implementation = PACKED_ATTENTION
    layered, together = PackedKVCache(config, block=BLOCK), PackedKVCache(config, block=BLOCK)
    generator = torch.Generator().manual_seed(0)
    for tokens in (100, 50):
        states = [torch.randn(2, 2, heads[i], tokens, 32, generator=generator) for i in range(3)]
        layered.plan, together.plan = plan, None
        for cache in (layered, together):
            for layer in range(3):
                cache.update(*states[layer], layer)
        layered.end_forward()
        together.plan = plan
        together.commit_ready()
    assert layered.committed == together.committed == 144
    for layer in range(3):
        mine, other = (cache.states(layer).dense() for cache in (layered, together))
        assert all(map(torch.equal, mine, other))
    assert sorted(i for store in layered.stores for i in store.layers) == [0, 1, 2]
    assert layered.token_bits().tolist() == together.token_bits().tolist()


def test_errors_of_held_tokens_are_those_of_the_tail():
    model, ids = tiny_model("llama"), random_ids(2, 60)
    cache, tail = (PackedKVCache(model.config, block=BLOCK) for _ in range(2))
    cache.holds = cache.record_errors = True
    for each in (cache, tail):
        feed(model, each, ids)
    assert not tail.stores  # nothing is committed there
    for mine, other in zip(cache.tail_errors(56), tail.tail_errors(56), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("policy", ["schedule", "rule"])
def test_a_driver_follows_crops_of_a_prompt(policy):
    model, ids = tiny_model("llama"), random_ids(1, 100)
    cache = PackedKVCache(model.config, block=BLOCK)
    driver = PolicyDriver(model, cache, POLICIES[policy]())
    cached = CachedModel(model, cache, driver)
    cached.read(ids)
    for removed in (3, 20, 41):
        cached.take_back(removed)
        cached.read(random_ids(1, removed, seed=removed))
        assert cache.get_seq_length() == driver.widths_so_far().shape[1] == 100
