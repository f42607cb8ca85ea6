"""The driver in `generate()`, decoding and scoring, over every policy."""

from collections import Counter

import pytest
import torch
from conftest import left_padded, random_ids, tiny_model

from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.plan import Step
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.decoding import decode
from helpers.policies.driver import PolicyDriver
from helpers.policies.features import entropy_of, log_probabilities
from helpers.policies.rarity import TokenCounts
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits
from helpers.policies.schedules import AgeSchedule

POLICIES = {
    "fixed": lambda: FixedBits(4),
    "random": lambda: RandomBits((0.25, 0.25, 0.25, 0.25), seed=1),
    "rule": lambda: EntropyRule((3.9, 4.1, 4.25)),
}
BLIND = ["fixed", "random"]
MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 0.8},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
@pytest.mark.parametrize("lengths", [[40], [40, 27, 33]], ids=["one", "left-padded"])
def test_generate_with_every_policy(family, policy, mode, lengths):
    model = tiny_model(family)
    batch = left_padded(lengths)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, POLICIES[policy]())
    torch.manual_seed(0)
    out = model.generate(
        **driver.prefill(batch), cache=cache, logits_processor=[driver], max_new_tokens=20, **MODES[mode]
    )
    assert out.shape == (len(lengths), 60)
    assert cache.get_seq_length() == 59
    assert cache.committed == 56
    widths = driver.widths_so_far()
    assert widths.shape == (len(lengths), 59)
    if policy == "fixed":
        assert (widths == 4).all()
    else:
        assert len(widths.unique()) > 1
    store = cache.stores[0]
    held = Counter()
    for stage, segment in store.layout.segments():
        held[stage.key_bits] += (segment.used(0).token[:, 0] != 255).sum(-1)
    assert not any(stage.pending for stage, _ in store.layout.segments())
    # Sinks stay at 16 bits, whatever was chosen for them.
    real = batch["attention_mask"].bool()
    sinks = torch.zeros_like(widths, dtype=torch.bool)
    sinks[:, :40] = real & (real.cumsum(-1) <= 4)
    stored = widths.masked_fill(sinks, 16)[:, :56]
    for bits, tokens in held.items():
        assert tokens.tolist() == (stored == bits).sum(-1).tolist()
    assert sum(held.values()).tolist() == [56] * len(lengths)


@pytest.mark.parametrize("policy", BLIND)
@pytest.mark.parametrize("mode", MODES)
def test_policies_without_features_need_no_prefill_and_follow_beams(family, policy, mode):
    model = tiny_model(family)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, POLICIES[policy]())
    torch.manual_seed(0)
    batch = left_padded([40, 31])
    out = model.generate(**batch, cache=cache, logits_processor=[driver], max_new_tokens=20, **MODES[mode])
    assert out.shape == (2, 60)
    assert cache.committed == 56


def test_a_fixed_width_needs_no_driver(family):
    model = tiny_model(family)
    batch = left_padded([40, 31])
    texts = []
    for with_driver in (False, True):
        cache = PackedKVCache(model.config, bits=None if with_driver else 4, block=8)
        processors = [PolicyDriver(model, cache, FixedBits(4))] if with_driver else None
        texts.append(
            model.generate(**batch, cache=cache, logits_processor=processors, max_new_tokens=30, do_sample=False)
        )
    assert torch.equal(*texts)


def test_beams_without_commits_equal_those_of_the_full_cache(family):
    model = tiny_model(family)
    batch = left_padded([20, 14])
    settings = {"max_new_tokens": 15, "num_beams": 3, "do_sample": False}
    expected = model.generate(**batch, **settings)
    assert torch.equal(model.generate(**batch, **settings, cache=PackedKVCache(model.config)), expected)


def test_policies_that_read_logits_refuse_beams_by_name():
    model = tiny_model("llama")
    for prefilled in (False, True):
        cache = PackedKVCache(model.config, block=8)
        driver = PolicyDriver(model, cache, EntropyRule())
        batch = left_padded([40])
        inputs = driver.prefill(batch) if prefilled else batch
        with pytest.raises(ValueError, match=r"'rule-based dynamic' reads .*beam search"):
            model.generate(**inputs, cache=cache, logits_processor=[driver], max_new_tokens=5, num_beams=2)


def test_a_policy_that_reads_logits_asks_for_the_prefill():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, EntropyRule())
    with pytest.raises(ValueError, match=r"call driver.prefill\(inputs\) before each"):
        model.generate(**left_padded([40]), cache=cache, logits_processor=[driver], max_new_tokens=5)


def test_the_driver_chooses_by_the_entropy_after_each_token():
    model = tiny_model("llama", dtype=torch.float64)
    ids = random_ids(2, 40)
    rule = EntropyRule((3.9, 4.1, 4.25))
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, rule)
    entropies = [
        entropy_of(log_probabilities(logits))
        for _, logits in score_blocks(CachedModel(model, cache, driver), ids, block=8)
    ]
    expected = torch.tensor([2, 4, 8, 16])[
        torch.bucketize(torch.cat(entropies, 1), torch.tensor(rule.thresholds).double(), right=True)
    ]
    assert torch.equal(driver.widths_so_far(), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_scoring_block_by_block_equals_decoding_token_by_token(family, policy):
    model = tiny_model(family, dtype=torch.float64)
    ids = random_ids(1, 45)
    cache = PackedKVCache(model.config, block=1 if policy == "random" else 8)
    driver = PolicyDriver(model, cache, POLICIES[policy]())
    blocks = torch.cat([logits for _, logits in score_blocks(CachedModel(model, cache, driver), ids, cache.block)], 1)
    twin = PackedKVCache(model.config, block=cache.block)
    twin_driver = PolicyDriver(model, twin, POLICIES[policy](), extra=("entropy", "confidence", "attn_var"))
    result = decode(CachedModel(model, twin, twin_driver), ids, forced=True)
    assert torch.allclose(result.features.entropy, entropy_of(log_probabilities(blocks)), atol=1e-8)
    assert torch.equal(driver.widths_so_far(), twin_driver.widths_so_far())
    assert torch.equal(result.correct[0], blocks[0, :-1].argmax(-1) == ids[0, 1:])
    assert len(result.latency_ms) == 45
    assert min(result.latency_ms) > 0


def test_greedy_decoding_writes_what_generate_writes(family):
    model = tiny_model(family)
    ids = random_ids(2, 20)
    expected = model.generate(input_ids=ids, max_new_tokens=15, do_sample=False)
    result = decode(CachedModel(model), ids, max_new_tokens=15)
    assert torch.equal(result.token_ids, expected)
    packed = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, packed, FixedBits(16))
    assert torch.equal(decode(CachedModel(model, packed, driver), ids, max_new_tokens=15).token_ids, expected)


def test_sampling_repeats_with_its_seed_and_stops_at_the_end():
    model = tiny_model("llama")
    ids = random_ids(1, 10)
    texts = [
        decode(CachedModel(model), ids, max_new_tokens=20, temperature=1.0, seed=seed).token_ids for seed in (0, 0, 1)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    model.generation_config.eos_token_id = int(texts[0][0, 14])
    short = decode(CachedModel(model), ids, max_new_tokens=20, temperature=1.0, seed=0)
    assert short.token_ids.shape[1] <= 15
    assert short.token_ids[0, -1] == model.generation_config.eos_token_id


def test_rarity_reaches_the_policy_from_the_given_counts():
    class Spy(FixedBits):
        needs = ("rarity",)

        def widths(self, features, batch, tokens):
            seen.append(features.rarity)
            return super().widths(features, batch, tokens)

    seen, model, ids = [], tiny_model("llama"), random_ids(2, 32)
    start = TokenCounts()
    start.rarity(range(90))
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, Spy(4), counts=start)
    for _ in score_blocks(CachedModel(model, cache, driver), ids, block=8):
        pass
    expected = [start.copy().rarity(row) for row in ids.tolist()]
    assert torch.allclose(torch.cat(seen, 1), torch.tensor(expected).float())


def test_wrong_widths_of_a_policy_are_refused():
    class Wrong(FixedBits):
        plan = None

        def widths(self, features, batch, tokens):
            return torch.full((batch, tokens + 1), 4)

    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, Wrong(4))
    with pytest.raises(ValueError, match=r"static 4-bit: widths must have shape \[1, 16\], got \[1, 17\]"):
        decode(CachedModel(model, cache, driver), random_ids(1, 20), forced=True)


def test_unknown_features_and_unfit_models_are_refused():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown feature"):
        PolicyDriver(model, PackedKVCache(model.config), FixedBits(4), extra=("mood",))
    plain = tiny_model("llama", packed=False)
    with pytest.raises(ValueError, match="use_packed_attention"):
        PolicyDriver(plain, PackedKVCache(plain.config), FixedBits(4), extra=("attn_var",))
    with pytest.raises(ValueError, match="forced=True"):
        decode(CachedModel(model), random_ids(1, 5))


def test_packed_attention_serves_other_caches_too(family):
    plain, packed = tiny_model(family, packed=False), tiny_model(family)
    batch = left_padded([20, 13])
    settings = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(packed.generate(**batch, **settings), plain.generate(**batch, **settings))
    assert torch.equal(packed(**batch, use_cache=False).logits, plain(**batch, use_cache=False).logits)


def test_the_driver_refuses_assisted_generation():
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1)
    for policy in POLICIES.values():
        cache = PackedKVCache(model.config, block=8)
        driver = PolicyDriver(model, cache, policy())
        inputs = driver.prefill(left_padded([40]))
        with pytest.raises(ValueError, match="cannot follow assisted generation"):
            model.generate(
                **inputs, cache=cache, logits_processor=[driver], max_new_tokens=9, assistant_model=assistant
            )


def test_looking_at_widths_does_not_change_them():
    model = tiny_model("llama")
    for make in POLICIES.values():
        seen = []
        for look in (False, True):
            cache = PackedKVCache(model.config, block=8)
            driver = PolicyDriver(model, cache, make())
            for _ in score_blocks(CachedModel(model, cache, driver), random_ids(1, 45), block=8):
                if look and driver.token_ids is not None:
                    assert torch.equal(driver.widths_so_far(), driver.widths_so_far())
            seen.append(driver.widths_so_far())
        assert torch.equal(*seen)


def test_a_padded_batch_is_committed_without_packed_attention_too():
    model = tiny_model("llama", packed=False)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, EntropyRule((3.9, 4.1, 4.25)))
    batch = left_padded([14, 9])
    model.generate(**driver.prefill(batch), cache=cache, logits_processor=[driver], max_new_tokens=30, do_sample=False)
    assert cache.committed == 40


def test_features_of_padding_are_numbers():
    model = tiny_model("llama")
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, FixedBits(4), extra=("attn_var", "entropy"))
    driver.prefill(left_padded([30, 12]))
    assert driver.latest.attn_var.isfinite().all()
    assert driver.latest.entropy.isfinite().all()


def test_assisted_generation_crops_the_packed_cache():
    model, assistant = tiny_model("llama"), tiny_model("llama", seed=1)
    batch = left_padded([40])
    expected = model.generate(**batch, max_new_tokens=20, do_sample=False)
    cache = PackedKVCache(model.config, block=8)
    out = model.generate(**batch, max_new_tokens=20, do_sample=False, assistant_model=assistant, cache=cache)
    assert torch.equal(out, expected)
    cache = PackedKVCache(model.config, bits=8, block=8)
    out = model.generate(**batch, max_new_tokens=20, do_sample=False, assistant_model=assistant, cache=cache)
    assert out.shape == expected.shape


class EverythingRead(FixedBits):
    """Reads features that the driver must keep in step with the cache."""

    needs = ("entropy", "surprisal", "rarity")

    def widths(self, features, batch, tokens):
        assert features.surprisal.shape == features.rarity.shape == (batch, tokens)
        self.seen.append(features.entropy)
        return super().widths(features, batch, tokens)


def everything_read(commit=8):
    policy = EverythingRead(commit)
    object.__setattr__(policy, "seen", [])
    return policy


@torch.no_grad()
@pytest.mark.parametrize("removed", [1, 3, 11, 16, 27, 36])
def test_after_a_crop_the_driver_knows_what_it_knew_before(removed):
    """A text, a wrong continuation taken back, then the right one: features are those of the right text alone."""
    model, block = tiny_model("llama", dtype=torch.float64), 8
    right, wrong = random_ids(1, 80), random_ids(1, 36, seed=5)
    drivers = []
    for detour in (0, removed):
        driver = PolicyDriver(model, PackedKVCache(model.config, block=block), everything_read(16))
        last = []
        for at in range(40):
            logits = model(input_ids=right[:, at : at + 1], cache=driver.cache).logits
            driver.observe(right[:, at : at + 1], logits)
            last.append(logits[:, -1])
        for at in range(detour):
            token = wrong[:, at : at + 1]
            driver.observe(token, model(input_ids=token, cache=driver.cache).logits)
        driver.crop(detour, last[-1])
        assert driver.cache.get_seq_length() == 40
        assert driver.token_ids.shape[1] == driver.features.entropy.shape[1] == driver.cache.tail_length
        assert torch.equal(driver.token_ids[0], right[0, driver.cache.committed : 40])
        token = right[:, 40:41]
        driver.observe(token, model(input_ids=token, cache=driver.cache).logits)
        drivers.append(driver)
    plain, cropped = drivers
    assert torch.equal(cropped.latest.surprisal, plain.latest.surprisal)
    assert cropped.row_counts[0].counts == plain.row_counts[0].counts
    assert cropped.row_counts[0].total == plain.row_counts[0].total
    assert cropped.widths_so_far().shape == plain.widths_so_far().shape


@torch.no_grad()
def test_blocks_that_a_crop_cut_short_are_committed_with_their_own_features():
    model = tiny_model("llama", dtype=torch.float64)
    policy = everything_read()
    driver = PolicyDriver(model, PackedKVCache(model.config, block=8), policy)
    read, logits_of, seed, commits = [], [], 0, 0
    for removed in (0, 5, 0, 13, 9, 0, 21, 2):
        if removed:
            del read[-removed:], logits_of[-removed:]
            driver.crop(removed, logits_of[-1][None])
        for token in random_ids(1, 23, seed := seed + 1)[0].tolist():
            ids = torch.tensor([[token]])
            logits = model(input_ids=ids, cache=driver.cache).logits
            read.append(token)
            logits_of.append(logits[0, -1])
            start = driver.cache.committed
            driver.observe(ids, logits)
            for seen in policy.seen:
                expected = entropy_of(log_probabilities(torch.stack(logits_of)))[start : start + seen.shape[1]]
                assert torch.equal(seen[0], expected)
            commits += len(policy.seen)
            policy.seen.clear()
    assert commits > 5
    assert driver.widths_so_far().shape == (1, len(read))


@torch.no_grad()
def test_a_crop_says_what_it_needs():
    model = tiny_model("llama")
    driver = PolicyDriver(model, PackedKVCache(model.config, block=8), everything_read())
    driver.observe(random_ids(1, 20), model(input_ids=random_ids(1, 20), cache=driver.cache).logits)
    with pytest.raises(ValueError, match="reads surprisal: crop needs last_logits"):
        driver.crop(3)
    with pytest.raises(ValueError, match="tokens must lie between 0 and 20, which are read, got 21"):
        driver.crop(21)


def test_a_schedule_that_reads_features_is_refused():
    class Curious(AgeSchedule):
        needs = ("entropy",)

    model = tiny_model("llama")
    with pytest.raises(ValueError, match="goes by age alone and cannot read entropy"):
        PolicyDriver(model, PackedKVCache(model.config), Curious(8, (Step(1, 4),)))
