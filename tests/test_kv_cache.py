"""The packed cache against `DynamicCache` and against itself: storage, attention, every inherited method."""

import copy

import numpy as np
import pytest
import torch
from conftest import left_padded, random_ids, tiny_config, tiny_model
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from helpers.cache.bucket import Stage
from helpers.cache.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.cache.tokens import EMPTY, joined, take
from helpers.policies.cached_model import CachedModel, score_blocks

WIDTH_CHOICES = [16, 8, 4, 2, (8, 4)]
BATCHES = {"one": [40], "left-padded": [40, 25, 31]}


def feed(model, cache, ids, mask=None, chunk=None):
    """Logits of `ids` fed in chunks of `chunk` tokens; padded rows get their positions from the mask."""
    chunk, logits = chunk or ids.shape[1], []
    done = cache.get_seq_length()
    with torch.no_grad():
        for start in range(0, ids.shape[1], chunk):
            part = ids[:, start : start + chunk]
            extra = {}
            if mask is not None:
                seen = mask[:, : done + start + part.shape[1]]
                positions = (seen.cumsum(-1) - 1).clamp(min=0)[:, -part.shape[1] :]
                extra = {"attention_mask": seen, "position_ids": positions}
            logits.append(model(input_ids=part, cache=cache, **extra).logits)
    return torch.cat(logits, dim=1)


def mixed_commits(model, ids, mask=None, seed=0, block=8):
    """A cache whose blocks were committed at random widths, each row its own."""
    cache = PackedKVCache(model.config, block=block)
    rng = np.random.default_rng(seed)
    if mask is not None:
        cache.visible = mask.bool()
    feed(model, cache, ids, mask)
    cache.commit(rng.choice([2, 4, 8, 16], size=(len(ids), cache.committable)))
    return cache


def all_tensors(thing, seen=None):
    """Every tensor reachable from an object, by walking attributes and containers."""
    seen = {} if seen is None else seen
    if id(thing) in seen or isinstance(thing, str | int | float | type(None) | np.ndarray):
        return []
    seen[id(thing)] = thing
    if isinstance(thing, torch.Tensor):
        return [thing]
    if isinstance(thing, dict):
        inside = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inside = list(thing)
    else:
        inside = list(getattr(thing, "__dict__", {}).values())
    return [tensor for part in inside for tensor in all_tensors(part, seen)]


def stored(cache: PackedKVCache, below: int) -> dict[tuple, bytes]:
    """The stored bytes of each token at a position under `below`, by stage, layer, row, head and position."""
    found = {}
    for store in cache.stores:
        for stage, segment in store.layout.segments():
            tokens = segment.used()
            position = tokens.positions()
            sides = [x for name, x in tokens.named().items() if name.startswith(("key", "value"))]
            for slot in ((tokens.token != EMPTY) & (position < below)).nonzero().tolist():
                content = b"".join(x[tuple(slot)].numpy().tobytes() for x in sides)
                found[stage, *slot[:3], int(position[tuple(slot)])] = content
    return found


def same_content(a: PackedKVCache, b: PackedKVCache, atol: float = 0.0) -> None:
    """Both caches hold the same tokens, stored alike: codes, scales, positions, and tails up to `atol`."""
    assert a.get_seq_length() == b.get_seq_length()
    assert a.committed == b.committed
    for layer in range(len(a.layers)):
        mine, other = a.states(layer), b.states(layer)
        assert torch.allclose(mine.tail_keys, other.tail_keys, rtol=0, atol=atol)
        assert torch.allclose(mine.tail_values, other.tail_values, rtol=0, atol=atol)
    for mine, other in zip(a.stores, b.stores, strict=True):
        assert mine.layout.buckets.keys() == other.layout.buckets.keys()
        for stage, bucket in mine.layout.buckets.items():
            # In text order, since segments may divide the same tokens differently.
            for ours, theirs in zip(
                *(in_text_order(each) for each in (bucket, other.layout.buckets[stage])), strict=True
            ):
                assert torch.equal(ours, theirs)


def in_text_order(bucket) -> list[torch.Tensor]:
    """Every field of the tokens of a bucket, those of each layer, row and head by position."""
    if not bucket.segments:
        return []
    held = joined([segment.used() for segment in bucket.segments])
    layers, rows, heads, slots = held.token.shape
    order = held.positions().masked_fill(held.token == EMPTY, 2**40).argsort(dim=-1, stable=True)
    real = (held.token != EMPTY).sum(-1).max()
    every = {**held.named(), "block_start": held.block_start.expand(layers, rows, heads, slots)}
    fields = [take(x, order)[:, :, :, :real] for x in every.values()]
    empty = take(held.token, order)[:, :, :, :real] == EMPTY
    return [x.masked_fill(empty.reshape(*empty.shape, *[1] * (x.ndim - 4)), 0) for x in fields]


def test_layers_implement_the_whole_contract():
    from helpers.cache.layer import PackedLayer

    for name, member in vars(CacheLayerMixin).items():
        if callable(member) and not name.startswith("_"):
            assert name in vars(PackedLayer), f"{name} is inherited, not implemented"


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_all_16_bit_equals_dynamic_cache(family, head_dim, lengths):
    model = tiny_model(family, head_dim)
    batch = left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = feed(model, DynamicCache(config=model.config), ids, mask)
    logits = feed(model, PackedKVCache(model.config, bits=16, block=4), ids, mask, chunk=4)
    real = mask.bool()
    assert (logits - expected)[real].abs().max() < 2e-3
    untouched = feed(model, PackedKVCache(model.config, block=4), ids, mask, chunk=4)
    assert (untouched - expected)[real].abs().max() < 1e-5


def test_without_commits_greedy_text_is_identical(family, head_dim):
    model = tiny_model(family, head_dim)
    batch = left_padded([20, 13, 17])
    settings = {"max_new_tokens": 30, "do_sample": False}
    expected = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, cache=PackedKVCache(model.config)), expected)


@pytest.mark.parametrize("bits", WIDTH_CHOICES, ids=str)
@pytest.mark.parametrize("quantizer", ["rotated", "minmax"])
@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_packed_attention_equals_attention_over_dequantized_states(family, head_dim, bits, quantizer, lengths):
    model = tiny_model(family, head_dim)
    batch = left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = PackedKVCache(model.config, bits=bits, block=8, quantizer=quantizer)
    feed(model, cache, ids[:, :32], mask)
    cache.commit_ready()
    assert cache.committed == 32 if len(lengths) == 1 else cache.committed > 0
    twin = copy.deepcopy(cache)
    packed = feed(model, cache, ids[:, 32:], mask)
    model.set_attn_implementation("sdpa")
    twin.config._attn_implementation = "sdpa"
    dense = feed(model, twin, ids[:, 32:], mask)
    assert (packed - dense)[mask[:, 32:].bool()].abs().max() < 1e-5


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_packed_equals_dense_when_every_row_chose_its_own_widths(family, lengths):
    model = tiny_model(family)
    batch = left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = mixed_commits(model, ids[:, :36], mask[:, :36])
    assert cache.committed == 32
    assert len(cache.stores[0].layout.buckets) == 4
    twin = copy.deepcopy(cache)
    packed = feed(model, cache, ids[:, 36:], mask)
    model.set_attn_implementation("sdpa")
    twin.config._attn_implementation = "sdpa"
    assert (packed - feed(model, twin, ids[:, 36:], mask))[mask[:, 36:].bool()].abs().max() < 1e-5


@pytest.mark.parametrize("bits", WIDTH_CHOICES, ids=str)
@pytest.mark.parametrize("lengths", [[45], [45, 30, 36]], ids=["one", "left-padded"])
def test_block_by_block_equals_token_by_token(family, head_dim, bits, lengths):
    model = tiny_model(family, head_dim, torch.float64)
    batch = left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for quantizer in ("rotated", "minmax"):
        caches = [PackedKVCache(model.config, bits=bits, block=8, quantizer=quantizer) for _ in range(2)]
        single = feed(model, caches[0], ids, mask, chunk=1)
        blocks = feed(model, caches[1], ids, mask, chunk=8)
        assert (single - blocks)[mask.bool()].abs().max() < 1e-8
        assert caches[0].committed == caches[1].committed == 40


def test_scoring_is_feeding_block_by_block(family):
    model, ids = tiny_model(family), random_ids(2, 45)
    caches = [PackedKVCache(model.config, bits=4, block=8) for _ in range(2)]
    scored = torch.cat([logits for _, logits in score_blocks(CachedModel(model, caches[0]), ids, block=8)], dim=1)
    assert torch.equal(scored, feed(model, caches[1], ids, chunk=8))


def test_quantization_is_really_applied(family):
    model = tiny_model(family)
    ids = random_ids(1, 48)
    full = feed(model, DynamicCache(config=model.config), ids)
    errors = [
        (feed(model, PackedKVCache(model.config, bits=bits, block=8), ids, chunk=8) - full).abs().mean()
        for bits in (16, 8, 4, 2)
    ]
    assert 0 < errors[0] < errors[1] < errors[2] < errors[3]


def test_unpadded_rows_of_a_batch_equal_the_rows_alone(family):
    model = tiny_model(family, dtype=torch.float64)
    ids = random_ids(3, 40)
    together = feed(model, PackedKVCache(model.config, bits=4, block=8), ids, chunk=8)
    for row in range(3):
        alone = feed(model, PackedKVCache(model.config, bits=4, block=8), ids[row : row + 1], chunk=8)
        assert (together[row] - alone[0]).abs().max() < 1e-8


def test_padding_does_not_reach_the_centre_or_the_attention():
    model = tiny_model("llama", dtype=torch.float64)
    batch = left_padded([24, 40])
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    other["input_ids"][0, :16] = 55  # other padding tokens, same mask
    logits = []
    for b in (batch, other):
        cache = PackedKVCache(model.config, bits=4, block=8)
        logits.append(feed(model, cache, b["input_ids"], b["attention_mask"], chunk=8))
        assert cache.committed == 32
    real = batch["attention_mask"].bool()
    assert torch.allclose(logits[0][real], logits[1][real], atol=1e-10)


def test_nothing_is_committed_before_every_row_has_sixteen_real_tokens():
    model = tiny_model("llama")
    batch = left_padded([10, 40])
    cache = PackedKVCache(model.config, bits=4, block=8)
    feed(model, cache, batch["input_ids"], batch["attention_mask"])
    assert cache.committable == 0
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 8, dtype=torch.long)], 1)
    feed(model, cache, random_ids(2, 7), mask[:, :47])
    assert cache.committable == 0
    feed(model, cache, random_ids(2, 1), mask)
    assert cache.committable == 48


def test_memory_at_four_bits_against_half_precision():
    config = tiny_config("llama", head_dim=64)
    config._attn_implementation, config.num_hidden_layers = PACKED_ATTENTION, 4  # which share the phases of positions
    cache = PackedKVCache(config, bits=4)
    keys = torch.randn(1, 2, 4096, 64, dtype=torch.float16)
    for at in range(4096):
        for layer in cache.layers:
            layer.update(keys[:, :, at : at + 1], keys[:, :, at : at + 1])
    half = 4096 * 2 * 64 * 2 * 2 * len(cache.layers)
    assert cache.live_bytes() <= 0.31 * half
    assert cache.stored_bytes() <= 0.34 * half


@pytest.mark.parametrize("prepare", ["growing", "prompt", "settled", "mixed", "padded", "cropped"])
def test_stored_bytes_are_the_bytes_of_every_tensor_owned(prepare):
    model = tiny_model("llama")
    batch = left_padded([60, 50] if prepare == "padded" else [60, 60])
    if prepare == "mixed":
        cache = mixed_commits(model, batch["input_ids"])
    else:
        cache = PackedKVCache(model.config, bits=None if prepare == "settled" else 4, block=8)
        feed(model, cache, batch["input_ids"], batch["attention_mask"] if prepare == "padded" else None,
             chunk=None if prepare == "prompt" else 4)  # fmt: skip
    if prepare == "settled":
        cache.record_received = True
        cache.commit(4, pending=True)
        cache.settle(4, 2, blocks=3)
    if prepare == "cropped":
        cache.crop(-30)
    del cache.config, cache.handle  # the model's, and a number by which compiled code finds the cache: no contents
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in all_tensors(cache)}
    assert cache.stored_bytes() == sum(storages.values())
    assert 0 < cache.live_bytes() <= cache.stored_bytes()


def test_reserved_length_is_allocated_once():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, bits=4, block=8, max_length=256, sinks=0)
    feed(model, cache, random_ids(1, 40), chunk=8)
    (bucket,) = cache.stores[0].layout.buckets.values()
    before = bucket.segments[0].buffers.key.codes.data_ptr()
    feed(model, cache, random_ids(1, 200), chunk=8)
    assert [segment.capacity for segment in bucket.segments] == [256]
    assert bucket.segments[0].buffers.key.codes.data_ptr() == before


def test_widths_are_counted_as_stored():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, bits=4, block=8, sinks=0)
    feed(model, cache, random_ids(1, 48), chunk=8)
    assert cache.code_bits() == pytest.approx((40 * 4 + 8 * 16) / 48)
    assert cache.bits_per_element() > cache.code_bits()
    assert PackedKVCache(model.config).bits_per_element() == 0


def test_settled_tokens_are_where_each_head_wanted_them():
    model = tiny_model("llama")
    ids = random_ids(2, 48)
    cache = PackedKVCache(model.config, block=8, sinks=0)
    feed(model, cache, ids)
    cache.commit(8, pending=True)
    before = [cache.states(i).dense() for i in range(2)]
    scores = torch.rand(2, 2, 2, 32, generator=torch.Generator().manual_seed(1))
    assert cache.pending_blocks(8) == 6
    cache.settle(8, 2, blocks=4, keep=2, scores=lambda demotion: scores)
    assert cache.pending_blocks(8) == 2
    store = cache.stores[0]
    counts = {
        (stage.key_bits, stage.pending): bucket.slots for stage, bucket in store.layout.buckets.items() if bucket.slots
    }
    assert counts == {(8, True): 16, (8, False): 8, (2, False): 24}
    for layer in range(2):
        keys, values = cache.states(layer).dense()
        best = scores[layer].unflatten(-1, (4, 8)).topk(2, dim=-1).indices + torch.arange(0, 32, 8)[:, None]
        kept = torch.zeros(2, 2, 48, dtype=torch.bool).scatter_(2, best.flatten(2), True)
        kept[:, :, 32:] = True
        for now, then in ((keys, before[layer][0]), (values, before[layer][1])):
            assert torch.allclose(now[kept], then[kept], atol=1e-6)
            assert not torch.isclose(now[~kept], then[~kept]).all(dim=-1).any()
            assert (now - then)[~kept].abs().mean() < then.abs().mean()


def test_settling_in_steps_and_keys_apart_from_values():
    model = tiny_model("llama", dtype=torch.float64)
    ids = random_ids(1, 40)
    cache = PackedKVCache(model.config, block=8, sinks=0)
    feed(model, cache, ids)
    cache.commit((8, 4), pending=True)
    values_before = cache.states(0).dense()[1]
    cache.settle((8, 4), (4, 4), blocks=5, pending=True)
    assert torch.equal(cache.states(0).dense()[1], values_before)
    cache.settle((4, 4), (2, 2), blocks=2)
    assert cache.pending_blocks(4) == 3
    assert cache.code_bits() == pytest.approx((16 * 2 + 24 * 4) / 40)
    twin = copy.deepcopy(cache)
    packed = feed(model, cache, random_ids(1, 5, 1), chunk=1)
    model.set_attn_implementation("sdpa")
    twin.config._attn_implementation = "sdpa"
    assert (packed - feed(model, twin, random_ids(1, 5, 1), chunk=1)).abs().max() < 1e-10


def test_space_of_settled_blocks_is_reclaimed():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    sizes = []
    for step in range(60):
        feed(model, cache, random_ids(1, 8, step))
        cache.commit(8, pending=True) if cache.committable else None
        while cache.pending_blocks(8) > 3:
            cache.settle(8, 2)
        pending = [s for stage, s in cache.stores[0].layout.segments() if stage.pending] if cache.stores else []
        sizes.append(sum(segment.capacity for segment in pending))
    assert max(sizes) == 24  # three blocks, and nothing to spare
    assert cache.committed == 480


@pytest.mark.parametrize("window", [64, 10])
def test_received_attention_is_that_of_later_blocks(window, monkeypatch):
    """A prompt read at once counts its newest queries; what is read after the commit counts whole."""
    monkeypatch.setattr("helpers.cache.attention.received.RECEIVED_WINDOW", window)
    model = tiny_model("llama", dtype=torch.float64)
    ids = random_ids(1, 28)
    cache = PackedKVCache(model.config, block=8, sinks=0)
    cache.record_received = True
    feed(model, cache, ids[:, :24])
    cache.commit(16, pending=True)
    feed(model, cache, ids[:, 24:])
    eager = tiny_model("llama", dtype=torch.float64, packed=False)
    eager.set_attn_implementation("eager")
    weights = eager(input_ids=ids, output_attentions=True).attentions
    (bucket,) = cache.stores[0].layout.buckets.values()
    for layer in range(2):
        block = torch.arange(28) // 8
        later = (block[:, None] > block) & (torch.arange(28)[:, None] >= 24 - window)
        expected = (weights[layer][0] * later)[:, :, :24].unflatten(0, (2, 2)).sum((1, 2))
        received = torch.cat([segment.used(layer).received[0] for segment in bucket.segments], -1)
        assert torch.allclose(received.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.settle(8, 2), "blocks must lie between 1 and the number of pending blocks at 8 bits"),
        (lambda c: c.settle(4, 2, blocks=9), "pending blocks at 4 bits"),
        (lambda c: c.settle(4, 3), "target must be one of"),
        (lambda c: c.settle(4, 2, keep=2), "keep=2 needs scores"),
        (lambda c: c.settle(4, 2, keep=2, scores=torch.zeros_like, pending=True), "cannot be combined"),
        (lambda c: c.settle(4, 2, keep=9), "keep must lie between 0 and block"),
    ],
)
def test_settling_what_is_not_there_is_refused(call, message):
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    feed(model, cache, random_ids(1, 24))
    cache.commit(4, pending=True)
    with pytest.raises(ValueError, match=message):
        call(cache)


@pytest.mark.parametrize("lengths", BATCHES.values(), ids=BATCHES)
def test_reset_leaves_a_clean_cache(family, head_dim, lengths):
    model = tiny_model(family, head_dim)
    batch = left_padded(lengths)
    cache = mixed_commits(model, batch["input_ids"], batch["attention_mask"])
    cache.reset()
    assert (cache.get_seq_length(), cache.stored_bytes()) == (0, 0)
    ids = random_ids(3, 40, seed=5)
    again = feed(model, cache, ids, chunk=8)
    assert torch.equal(again, feed(model, PackedKVCache(model.config, block=8), ids, chunk=8))


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select", "select by mask"])
@pytest.mark.parametrize("lengths", [[44, 44, 44], [44, 29, 35]], ids=["equal", "left-padded"])
def test_row_operations_equal_a_cache_built_directly(family, head_dim, operation, lengths):
    model = tiny_model(family, head_dim)
    batch = left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    rows = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1], "select by mask": [0, 2]}[operation]
    rng = np.random.default_rng(3)
    widths = rng.choice([2, 4, 8, 16], size=(3, 40))
    caches = []
    for index in ([0, 1, 2], rows):
        cache = PackedKVCache(model.config, block=8)
        feed(model, cache, ids[index], mask[index])
        cache.commit(widths[index])
        caches.append(cache)
    if operation == "reorder":
        caches[0].reorder_cache(torch.tensor(rows))
    elif operation == "repeat":
        caches[0].batch_repeat_interleave(2)
    elif operation == "select":
        caches[0].batch_select_indices(torch.tensor(rows))
    else:
        caches[0].batch_select_indices(torch.tensor([True, False, True]))
    same_content(*caches)
    following = random_ids(len(rows), 9, seed=4)
    seen = torch.cat([mask[rows], torch.ones(len(rows), 9, dtype=torch.long)], dim=1)
    logits = [feed(model, cache, following, seen, chunk=3) for cache in caches]
    assert torch.allclose(logits[0], logits[1], atol=1e-5)


@pytest.mark.parametrize("removed", [0, 1, 4, 5, 11, 20, 43, 44, 60])
@pytest.mark.parametrize("lengths", [[44], [44, 29, 35]], ids=["one", "left-padded"])
def test_crop_leaves_the_rest_as_it_was_stored(family, head_dim, removed, lengths):
    model = tiny_model(family, head_dim)
    batch = left_padded(lengths)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    cache = mixed_commits(model, ids, mask)
    left = max(0, 44 - removed)
    before = stored(cache, below=left)
    cache.crop(-removed)
    assert cache.get_seq_length() == left
    assert stored(cache, below=left) == before == stored(cache, below=10**6)
    if left:
        twin = copy.deepcopy(cache)
        more = random_ids(len(ids), 20, 9)
        seen = torch.cat([mask[:, :left], torch.ones(len(ids), 20, dtype=torch.long)], dim=1)
        packed = feed(model, cache, more, seen, chunk=4)
        model.set_attn_implementation("sdpa")
        twin.config._attn_implementation = "sdpa"
        assert torch.allclose(packed, feed(model, twin, more, seen, chunk=4), atol=1e-5)
        if cache.committable:
            cache.commit(4)
            assert cache.committed > left - 8


def test_crop_after_heads_chose_their_own_tokens():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8, sinks=0)
    feed(model, cache, random_ids(2, 48))
    cache.commit(8, pending=True)
    scores = torch.rand(2, 2, 2, 40, generator=torch.Generator().manual_seed(2))
    cache.settle(8, 2, blocks=5, keep=3, scores=lambda demotion: scores)
    for removed in (13, 2, 9):  # into the pending block, through it, and into settled ones
        left = cache.get_seq_length() - removed
        before = stored(cache, below=left)
        cache.crop(-removed)
        assert stored(cache, below=left) == before == stored(cache, below=10**6)
        twin = copy.deepcopy(cache)
        packed = feed(model, copy.deepcopy(cache), random_ids(2, 3, 9))
        model.set_attn_implementation("sdpa")
        twin.config._attn_implementation = "sdpa"
        assert torch.allclose(packed, feed(model, twin, random_ids(2, 3, 9)), atol=1e-5)
        model.set_attn_implementation("packed_kv")


def check_crop(model, cache, removed, rows=2):
    """After a crop the rest is stored as before, and packed attention still equals dense attention."""
    left = cache.get_seq_length() - removed
    before = stored(cache, below=left)
    cache.crop(-removed)
    assert cache.get_seq_length() == left
    assert stored(cache, below=left) == before == stored(cache, below=10**6)
    one, other = copy.deepcopy(cache), copy.deepcopy(cache)
    one.config = model.config
    packed = feed(model, one, random_ids(rows, 3, 9))
    model.set_attn_implementation("sdpa")
    other.config._attn_implementation = "sdpa"
    assert torch.allclose(packed, feed(model, other, random_ids(rows, 3, 9)), atol=1e-5)
    model.set_attn_implementation(PACKED_ATTENTION)


@pytest.mark.parametrize("removed", [3, 12, 20, 27])
def test_crop_of_a_bucket_that_is_not_in_text_order(removed):
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    feed(model, cache, random_ids(2, 36))
    cache.commit(8, 16, pending=True)
    cache.commit(4, 16)
    cache.settle(8, 4, blocks=2)  # older tokens now lie behind newer ones
    check_crop(model, cache, removed)


def test_crops_between_commits_and_settles():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    generator = torch.Generator().manual_seed(4)
    feed(model, cache, random_ids(2, 40))
    for step, removed in enumerate((11, 3, 14, 6, 9)):
        while cache.committable:
            cache.commit(8, 8, pending=True)
        while (waiting := cache.pending_blocks(8)) > 1:
            slots = cache.stores[0].layout.buckets[Stage(8, 8, True)].blocks[0][1]
            scores = torch.rand(2, 2, 2, slots, generator=generator)
            cache.settle(8, 2, keep=3, scores=lambda demotion, scores=scores: scores)
            assert cache.pending_blocks(8) == waiting - 1
        check_crop(model, cache, removed)
        feed(model, cache, random_ids(2, 17, seed=step))
        segments = [segment for store in cache.stores for _, segment in store.layout.segments()]
        held = sum(int((segment.used().token != EMPTY).sum()) for segment in segments)
        assert held == cache.committed * 2 * 2 * 2  # layers, rows, heads


def test_crop_takes_a_count_to_remove():
    cache = mixed_commits(tiny_model("llama"), random_ids(1, 40))
    with pytest.raises(ValueError, match="non-positive number of tokens to remove, got 3"):
        cache.crop(3)


def test_offload_and_prefetch_keep_the_content():
    model = tiny_model("llama")
    cache, twin = (mixed_commits(model, random_ids(2, 40)) for _ in range(2))
    for layer in cache.layers:
        layer.offload()
    assert all(t.device.type == "cpu" for t in cache.tensors())
    for layer in cache.layers:
        layer.prefetch()
    same_content(cache, twin)


def test_lengths_and_mask_sizes():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, bits=4, block=8)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    feed(model, cache, random_ids(1, 37), chunk=5)
    assert cache.get_seq_length() == 37
    assert cache.get_mask_sizes(3, 1) == (40, 0)
    assert cache.get_max_length() == -1
    assert cache.is_croppable
    assert cache.is_sliding == [False, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", WIDTH_CHOICES, ids=str)
def test_half_precision_models(family, dtype, bits):
    model = tiny_model(family, dtype=dtype)
    ids = random_ids(2, 40)
    expected = feed(model, DynamicCache(config=model.config), ids)
    cache = PackedKVCache(model.config, bits=bits, block=8)
    logits = feed(model, cache, ids, chunk=8)
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    if bits in (8, 16):
        assert (logits - expected).float().abs().mean() < 0.1
    dense = cache.states(0).dense()
    assert dense[0].dtype == dtype


@pytest.mark.parametrize("bits", WIDTH_CHOICES, ids=str)
def test_non_contiguous_states_are_stored_like_contiguous_ones(bits):
    config = tiny_config("llama")
    caches = [PackedKVCache(config, bits=bits, block=8) for _ in range(2)]
    states = torch.randn(2, 40, 2, 32).transpose(1, 2)
    for cache, x in zip(caches, (states, states.contiguous()), strict=True):
        for part in x.split(10, dim=2):
            for layer in cache.layers:
                layer.update(part, part.flip(-1))
    same_content(*caches)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, r"bits must be one of \(2, 4, 8, 16\), got 3"),
        ({"bits": (4, 5)}, "got 5"),
        ({"bits": (4, 4, 4)}, "a width or a pair"),
        ({"block": 0}, "block must lie between 1 and 254 tokens, got 0"),
        ({"block": 255}, "block must lie between"),
        ({"quantizer": "int4"}, "quantizer must be one of"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedKVCache(tiny_config("llama"), **arguments)


def test_bad_commits_are_refused():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    feed(model, cache, random_ids(2, 30))
    for bits, tokens, message in [
        (4, 5, r"multiple of block \(8\) up to 24, got 5"),
        (4, 32, "up to 24, got 32"),
        (torch.full((1, 8), 4), None, r"shape \[2, tokens\]"),
        (torch.full((2, 8), 5), None, "must be one of"),
        (torch.full((2, 8), 4), 16, "bits holds 8 tokens a row, but tokens is 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            cache.commit(bits, tokens)
    with pytest.raises(ValueError, match="pending tokens must share one width"):
        cache.commit(torch.tensor([[2] * 8, [4] * 8]), pending=True)
    assert cache.committed == 0


def test_a_cache_serves_one_model_and_one_batch():
    model, other = tiny_model("llama"), tiny_model("llama", head_dim=64)
    cache = PackedKVCache(model.config)
    feed(model, cache, random_ids(2, 10))
    with pytest.raises(ValueError, match=r"holds 2 sequence\(s\), the model sent 3"):
        feed(model, cache, random_ids(3, 1))
    with pytest.raises(ValueError, match="use one cache per model"):
        feed(other, cache, random_ids(2, 1))
