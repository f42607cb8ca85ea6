"""Peak, held and live bytes: as an independent tracer sees them, and within what is promised of them.

Bytes depend on the shapes alone, so that targets are checked without a model: states are drawn at random, and the
cache is told of them as a model would.
"""

import copy
import os

import pytest
import torch
from conftest import left_padded, random_ids, tiny_config, tiny_model
from transformers import DynamicCache, LlamaConfig

from helpers.cache.kv_cache import PACKED_ATTENTION, PackedKVCache
from helpers.cache.plan import Plan, Step
from helpers.cache.quantization import rotation_matrix
from helpers.evaluation.tracing import trace_cache
from helpers.models import shape_config
from helpers.policies.driver import PolicyDriver
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits
from helpers.policies.schedules import COMPACT_SCHEDULE, MIDDLE_SCHEDULE, QUALITY_SCHEDULE, AgeSchedule

rotation_matrix(32)  # made once in a process, for all caches

POLICIES = {
    "static 4": lambda: FixedBits(4),
    "static 2": lambda: FixedBits(2),
    "schedule": lambda: AgeSchedule(*QUALITY_SCHEDULE),
    "rule": lambda: EntropyRule((3.9, 4.1, 4.25)),
    "random": lambda: RandomBits(),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("lengths", [[200], [200, 120, 160, 77]], ids=["one", "left-padded"])
def test_the_peak_is_what_tracing_every_tensor_gives(policy, lengths):
    model = tiny_model("llama", layers=3)
    cache = PackedKVCache(model.config)
    driver = PolicyDriver(model, cache, POLICIES[policy]())
    with trace_cache(cache) as trace:
        inputs = driver.prefill(left_padded(lengths))
        model.generate(**inputs, cache=cache, logits_processor=[driver], max_new_tokens=40, do_sample=False)
    assert 0.98 * trace.peak_bytes <= cache.peak_bytes() <= 1.02 * trace.peak_bytes
    assert cache.peak_bytes() >= cache.stored_bytes()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_peak_of_a_padded_batch_is_predicted_to_the_byte(policy):
    """Everything but what rows share grows with their number: two sizes tell every other.

    But for sinks, which leave gaps in other blocks of each row.
    """
    model, peaks = tiny_model("llama", layers=3), {}
    for rows in (2, 3, 4):
        cache = PackedKVCache(model.config, sinks=0)
        driver = PolicyDriver(model, cache, POLICIES[policy]())
        inputs = driver.prefill(left_padded([200, 120, 160, 77][:rows]))
        model.generate(**inputs, cache=cache, logits_processor=[driver], max_new_tokens=40, do_sample=False)
        peaks[rows] = cache.peak_bytes()
    assert peaks[4] == peaks[3] + (peaks[3] - peaks[2])


@pytest.mark.parametrize("bits", [4, 2])
def test_the_peak_where_states_are_handed_out_dense(bits):
    model = tiny_model("llama", packed=False, layers=3)
    cache = PackedKVCache(model.config, bits=bits)
    with trace_cache(cache) as trace:
        model.generate(input_ids=random_ids(1, 200), cache=cache, max_new_tokens=40, do_sample=False)
    assert 0.98 * trace.peak_bytes <= cache.peak_bytes() <= 1.02 * trace.peak_bytes


def test_tracing_the_librarys_cache_gives_what_a_hand_computes():
    config = tiny_config("llama", layers=3)
    cache = DynamicCache(config=config)
    n, token = 50, 2 * 32 * 4  # bytes of one token's keys, or values, in one layer
    with trace_cache(cache) as trace:
        read(cache, config, n)
        assert trace.peak_bytes == 6 * n * token
        read(cache, config, 1)
    # All keys and values have grown by a token when the last are copied, whose shorter form is still there.
    assert trace.peak_bytes == (6 * (n + 1) + n) * token


def test_a_reset_begins_anew():
    config = tiny_config("llama")
    config._attn_implementation = PACKED_ATTENTION
    cache = PackedKVCache(config, bits=4)
    assert cache.peak_bytes() == 0
    read(cache, config, 100)
    first = cache.peak_bytes()
    cache.reset()
    assert cache.peak_bytes() == 0
    read(cache, config, 40)
    assert 0 < cache.peak_bytes() < first
    cache.reset()
    read(cache, config, 100)
    assert cache.peak_bytes() == first


def test_a_copy_counts_for_itself():
    config = tiny_config("llama")
    config._attn_implementation = PACKED_ATTENTION
    cache = PackedKVCache(config, bits=4)
    read(cache, config, 100)
    twin = copy.deepcopy(cache)
    before = cache.peak_bytes()
    assert twin.peak_bytes() == before
    for _ in range(10):
        read(twin, config, 100)
        read(cache, config, 100)
    assert twin.peak_bytes() == cache.peak_bytes() > before
    del cache
    assert twin.stored_bytes() <= twin.peak_bytes()


EMBEDDED = LlamaConfig(
    hidden_size=192, num_attention_heads=3, num_key_value_heads=3, head_dim=64, num_hidden_layers=6, vocab_size=100
)
MODELS = {"embedded": EMBEDDED, "SmolLM-135M": shape_config("SmolLM-135M")}
WIDTHS = torch.tensor([2, 4, 8, 16])


def best_at_random(demotion):
    return torch.rand(demotion.key_error.shape)


PLANS = {
    "static 4": Plan(4),
    "middle": Plan(*MIDDLE_SCHEDULE, best_at_random),
    "compact": Plan(*COMPACT_SCHEDULE, best_at_random),
    "held": None,
}


def read(cache, config, tokens: int, rows: int = 1) -> None:
    """Tell a cache of tokens as a model does, layer by layer."""
    heads, dim = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, rows, heads, tokens, dim), layer)
    if isinstance(cache, PackedKVCache):
        cache.end_forward()


@pytest.mark.parametrize("plan", ["static 4", "middle", "compact"])
def test_the_peak_of_a_long_text_is_predicted_to_the_byte(plan):
    """`LONG_RUN_TOKENS=20000` decodes as many; the peak of three rows follows from that of one and of two."""
    config, peaks = copy.deepcopy(EMBEDDED), {}
    config._attn_implementation, config.num_hidden_layers = PACKED_ATTENTION, 2
    for rows in (1, 2, 3):
        cache = PackedKVCache(config)
        cache.plan = PLANS[plan]
        cache.record_received = bool(cache.plan.steps)
        read(cache, config, 100, rows)
        for _ in range(int(os.environ.get("LONG_RUN_TOKENS", "600"))):
            read(cache, config, 1, rows)
            cache.commit_ready()
        peaks[rows] = cache.peak_bytes()
        assert cache.committed > 600
    assert peaks[3] == peaks[2] + (peaks[2] - peaks[1])


def read_and_decode(config, plan: Plan | None, tokens: int, decoded: int = 64) -> PackedKVCache:
    """A cache that read a prompt and decoded; without a plan each token's width is drawn once it is read."""
    config = copy.deepcopy(config)
    config._attn_implementation = PACKED_ATTENTION
    cache = PackedKVCache(config)
    cache.plan, cache.holds, cache.record_received = plan, plan is None, plan is not None and bool(plan.steps)
    torch.manual_seed(0)
    for count in (tokens, *[1] * decoded):
        read(cache, config, count)
        if plan is None and cache.undecided:
            cache.commit(WIDTHS[torch.randint(4, (1, cache.undecided))])
    return cache


def full_bytes(config, tokens: int) -> int:
    dim = config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4 * tokens


def share_held(config, cache) -> float:
    """Held over live, as if the tail, whose size is fixed, were full."""
    tail = sum(x[:, :, layer.tail_length :].nbytes for layer in cache.layers for x in layer.states())
    return cache.stored_bytes() / (cache.live_bytes() + tail)


@pytest.fixture
def quick(monkeypatch):
    """Steps at 2 bits are not searched, which changes numbers and no bytes that are held."""
    monkeypatch.setattr("helpers.cache.quantization.STEP_SEARCH", [1.0])


# Tokens of the prompt, then the most that may be held of what lives: for plans, and for widths token by token.
HELD = {256: (1.12, 1.25), 512: (1.06, 1.12), 1024: (1.06, 1.12), 4096: (1.06, 1.12)}


@pytest.mark.parametrize("tokens", HELD)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_held_is_hardly_more_than_what_lives(name, tokens, quick):
    config, held = MODELS[name], {}
    for plan, made in PLANS.items():
        cache = read_and_decode(config, made, tokens)
        assert share_held(config, cache) <= HELD[tokens][plan == "held"], plan
        held[plan] = cache.stored_bytes()
    assert held["compact"] < held["middle"] < held["static 4"]
    if tokens >= 4096:
        assert held["compact"] <= 0.80 * held["static 4"]


@pytest.mark.parametrize("plan", PLANS)
def test_the_peak_is_the_cache_and_two_layers(plan):
    config = MODELS["SmolLM-135M"]
    cache = read_and_decode(config, PLANS[plan], 4096)
    full = full_bytes(config, 4160)
    peak = cache.peak_bytes()
    print(f"\n{plan}: peak {peak / full:.4f}, live {cache.live_bytes() / full:.4f} of full precision")
    if plan == "held":  # all of it stands at 8 bits until its widths are chosen
        assert peak <= 0.36 * full
    else:
        assert peak <= 1.05 * (cache.live_bytes() + 2 * full / config.num_hidden_layers)


def test_bytes_of_a_batch_and_of_steps_that_keep_nothing():
    """What is held to the byte, for a schedule simple enough to count by hand."""
    config = tiny_config("llama")
    config._attn_implementation = PACKED_ATTENTION
    cache = PackedKVCache(config, sinks=0, centre="none")
    cache.plan = Plan(8, (Step(2, 4),))
    read(cache, config, 100, rows=4)
    heads, dim = 2 * 4 * 2, 32  # of all layers and rows
    slot = {bits: heads * (2 * (dim * bits // 8 + 4) + 1) + 4 * 4 for bits in (8, 4)}
    fixed = dim * dim * 4  # rotation
    tail = heads * 16 * dim * 2 * 4
    assert cache.committed == 96
    assert cache.stored_bytes() == fixed + tail + 32 * slot[8] + 64 * slot[4]
    assert cache.live_bytes() == cache.stored_bytes() - tail * 12 // 16
