"""Schedules by age: which widths a text has after so many tokens, and which tokens stay."""

import pytest
import torch
from conftest import random_ids, tiny_model

from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.plan import Demotion, Step
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.driver import PolicyDriver
from helpers.policies.rules import FixedBits
from helpers.policies.schedules import AgeSchedule

THREE = AgeSchedule(8, (Step(2, 4), Step(4, 2, keep=0.25)))
APART = AgeSchedule((8, 4), (Step(1, (4, 2)), Step(2, (2, 2), keep=0.5)), "attention")


def run(model, policy, ids, block=8, chunk=None, sinks=0):
    cache = PackedKVCache(model.config, block=block, sinks=sinks)
    driver = PolicyDriver(model, cache, policy)
    for _, _ in score_blocks(CachedModel(model, cache, driver), ids, chunk or block):
        pass
    return cache, driver


def test_sinks_take_no_part_in_a_schedule():
    cache, _ = run(tiny_model("llama"), THREE, random_ids(2, 80), sinks=4)
    kept = {(8, 8, True): 16, (4, 4, True): 16, (4, 4, False): 12, (2, 2, False): 32, (16, 16, False): 4}
    assert stages(cache) == kept
    assert (cache.token_bits()[:, :4] == 16).all()


def stages(cache):
    """(key bits, value bits, pending) -> tokens in one head."""
    buckets = cache.stores[0].layout.buckets.items()
    return {(s.key_bits, s.value_bits, s.pending): b.slots for s, b in buckets if b.slots}


def test_blocks_move_on_with_age():
    model, ids = tiny_model("llama"), random_ids(2, 80)
    cache, _ = run(model, THREE, ids)
    # Of ten blocks of 8 the newest two are at 8 bits, the next two at 4, and of the other six a quarter stayed.
    assert stages(cache) == {(8, 8, True): 16, (4, 4, True): 16, (4, 4, False): 12, (2, 2, False): 36}
    bits = cache.token_bits()
    assert bits.shape == (2, 80)
    assert (bits[:, 64:] == 8).all()
    assert (bits[:, 48:64] == 4).all()
    assert bits[:, :48].mean() == pytest.approx(2.5)
    assert cache.code_bits() == pytest.approx(bits.mean().item())


def test_keys_and_values_on_schedules_of_their_own():
    model = tiny_model("llama")
    cache, _ = run(model, APART, random_ids(1, 64))
    assert stages(cache) == {(8, 4, True): 8, (4, 2, True): 8, (4, 2, False): 24, (2, 2, False): 24}


def test_a_prompt_read_at_once_ends_at_the_same_widths():
    model, ids = tiny_model("llama"), random_ids(1, 80)
    for policy in (THREE, APART):
        by_block, at_once = run(model, policy, ids)[0], run(model, policy, ids, chunk=80)[0]
        assert stages(by_block) == stages(at_once)
        kept = (at_once.token_bits() > 2).float(), (by_block.token_bits() > 2).float()
        # The prompt is ranked by its last 64 queries, the blocks by all later ones: mostly the same tokens stay.
        assert (kept[0] == kept[1]).float().mean() > 0.7


def test_the_tokens_that_stay_are_the_best_of_their_block_in_each_head():
    class Spy(AgeSchedule):
        def scores(self, demotion):
            scores = super().scores(demotion)
            seen.append((demotion, scores))
            return scores

    seen, model, ids = [], tiny_model("llama"), random_ids(1, 64)
    cache, _ = run(model, Spy(8, (Step(2, 2, keep=0.25),)), ids)
    assert [demotion.start for demotion, _ in seen] == [0, 8, 16, 24, 32, 40]
    demotion, scores = seen[0]
    assert torch.allclose(scores, demotion.received * (demotion.key_error + demotion.value_error))
    assert (demotion.received > 0).all()
    best = scores[:, 0].topk(2).indices  # [L, H, 2]
    bucket = next(b for s, b in cache.stores[0].layout.segments() if s.key_bits == 8 and not s.pending)
    kept = bucket.used().positions()[:, 0, :, :2]
    assert kept.sort(-1).values.tolist() == best.sort(-1).values.tolist()


def test_errors_are_what_the_demotion_changes():
    class Spy(AgeSchedule):
        def scores(self, demotion):
            seen.append(demotion)
            return super().scores(demotion)

    model, seen = tiny_model("llama"), []
    cache = PackedKVCache(model.config, block=8, sinks=0)
    driver = PolicyDriver(model, cache, Spy(8, (Step(2, 2, keep=0.125),), "random"))
    for _ in score_blocks(CachedModel(model, cache, driver), random_ids(1, 24), 8):
        if cache.committed == 16:  # two blocks are committed at once, the third will settle the first
            before = [cache.states(i).dense()[0][:, :, :8].clone() for i in range(2)]
    error = torch.stack([(cache.states(i).dense()[0][:, :, :8] - before[i]).square().sum(-1) for i in range(2)])
    moved = error > 1e-9
    assert moved.float().mean() == pytest.approx(7 / 8)
    assert len(seen) == 1
    assert torch.allclose(error[moved], seen[0].key_error[moved].float(), rtol=1e-3)


def test_random_choices_belong_to_the_text():
    model, ids = tiny_model("llama"), random_ids(1, 64)
    policy = AgeSchedule(8, (Step(2, 2, keep=0.25),), "random")
    first, again, other = (run(model, policy.for_text(t), ids)[0].token_bits() for t in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first[:, :32].mean() == pytest.approx(2 + 0.25 * 6)


def test_schedules_work_in_plain_generate_and_under_beams():
    model, ids = tiny_model("llama"), random_ids(1, 40)
    for beams in (1, 2):
        cache = PackedKVCache(model.config, block=8, sinks=0)
        driver = PolicyDriver(model, cache, THREE)
        out = model.generate(
            input_ids=ids, cache=cache, logits_processor=[driver], max_new_tokens=40, num_beams=beams,
            do_sample=False,
        )  # fmt: skip
        assert out.shape == (1, 80)
        assert min(stages(cache)) == (2, 2, False)


def test_ages_count_from_the_commit():
    """A block is settled exactly when so many blocks have followed it, not earlier."""
    model, policy = tiny_model("llama"), AgeSchedule(8, (Step(3, 2),))
    cache = PackedKVCache(model.config, block=8, sinks=0)
    driver = PolicyDriver(model, cache, policy)
    settled = []
    for _ in score_blocks(CachedModel(model, cache, driver), random_ids(1, 64), 8):
        settled.append(sum(n for (bits, _, _), n in stages(cache).items() if bits == 2) if cache.stores else 0)
    # What the block sees that is read as number n (from 0): two blocks are committed together, the centre needs 16.
    assert settled == [0, 0, 0, 0, 8, 16, 24, 32]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Step(0, 2), "after must be a number of blocks, 1 or more, got 0"),
        (lambda: Step(1, 3), "must be one of"),
        (lambda: Step(1, 2, keep=1.5), "keep must be a share between 0 and 1, got 1.5"),
        (lambda: AgeSchedule(8, ()), "a schedule needs one step or more"),
        (lambda: AgeSchedule(8, (Step(3, 4), Step(3, 2))), r"rising ages, got \[3, 3\]"),
        (lambda: AgeSchedule(8, (Step(3, 4, keep=0.5), Step(4, 2))), "only the last step"),
        (lambda: AgeSchedule(8, (Step(3, 4),), "age"), "ranking must be one of"),
    ],
)
def test_bad_schedules_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scores_of_another_shape_are_refused():
    class Wrong(AgeSchedule):
        def scores(self, demotion: Demotion) -> torch.Tensor:
            return torch.zeros(3)

    with pytest.raises(ValueError, match="scores must have shape"):
        run(tiny_model("llama"), Wrong(8, (Step(1, 2, keep=0.5),)), random_ids(1, 40))


def test_received_attention_needs_packed_attention():
    model = tiny_model("llama", packed=False)
    with pytest.raises(ValueError, match="received attention needs packed attention"):
        PolicyDriver(model, PackedKVCache(model.config), THREE)


def test_widths_of_tokens_in_a_cache_without_schedule():
    model = tiny_model("llama")
    cache, driver = run(model, FixedBits(4), random_ids(2, 44))
    assert cache.token_bits().tolist() == [[4.0] * 40 + [16.0] * 4] * 2
    assert torch.equal(cache.token_bits()[:, :40].int(), driver.widths_so_far()[:, :40].int())
