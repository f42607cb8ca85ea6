"""Long texts and many of them: memory as predicted, time per token at most linear, nothing that piles up.

`LONG_RUN_TOKENS=20000 python -m pytest tests/test_long_runs.py -s` decodes as many tokens and prints what it measured.
"""

import ctypes
import gc
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMON, random_ids
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.cache.attention.dispatch import use_packed_attention
from helpers.cache.bucket import FIRST_SLOTS, SPARE_SHARE
from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.plan import Step
from helpers.policies.cached_model import CachedModel
from helpers.policies.decoding import decode
from helpers.policies.driver import PolicyDriver
from helpers.policies.schedules import AgeSchedule

TOKENS = int(os.environ.get("LONG_RUN_TOKENS", "2400"))
SEQUENCES = 200
MIB = 2**20
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
LAYERS, KV_HEADS, HEAD_DIM, BLOCK = 2, 2, 32, 16
SCHEDULE = AgeSchedule(8, (Step(2, 4), Step(5, 2, keep=0.25)))


@pytest.fixture(scope="module")
def model():
    """A random model whose positions reach as far as the test, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", **COMMON, hidden_size=64, num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
        num_hidden_layers=LAYERS, intermediate_size=64, max_position_embeddings=TOKENS + 100, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    model.generation_config.eos_token_id = None
    yield use_packed_attention(model)
    torch.set_num_threads(threads)


def resident_bytes() -> int:
    """Memory of this process that is in use now, without what was freed and is kept to be used again.

    A step needs room for the numbers that it reads out of the packed store, more of it the longer the text; between
    two steps that room is free. Tests are skipped where the system does not tell.
    """
    path = Path("/proc/self/statm")
    if not path.exists():
        pytest.skip("the system does not tell how much memory is resident")
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watching(PolicyDriver):
    """Looks at the cache and at the process now and then, and at every logit."""

    every = max(1, TOKENS // 40)

    def reset(self):
        super().reset()
        self.seen = []

    def observe(self, token_ids, logits):
        assert torch.isfinite(logits).all()
        super().observe(token_ids, logits)
        length = self.cache.get_seq_length()
        if length % self.every == 0:
            spent = time.process_time()  # before what looking costs
            self.seen.append((length, self.cache.stored_bytes(), self.cache.live_bytes(), resident_bytes(), spent))


def slots(length: int) -> dict[tuple[int, bool], int]:
    """How many tokens a head holds at which (width, pending) once `length` tokens were read: the schedule by hand."""
    blocks = length // BLOCK
    eight = min(blocks, 2)
    four = min(blocks - eight, 3)
    settled = (blocks - eight - four) * BLOCK
    return {(8, True): eight * BLOCK, (4, True): four * BLOCK, (4, False): settled // 4, (2, False): settled * 3 // 4}


def predicted_bytes(length: int) -> tuple[float, float]:
    """Bytes of the tokens in the cache, and with the spare room that its tail and its buckets may have."""
    heads = LAYERS * KV_HEADS
    constant = HEAD_DIM**2 * 4  # rotation
    tail = heads * HEAD_DIM * 2 * 4
    live, most = constant + length % BLOCK * tail, constant + BLOCK * tail
    for (bits, pending), count in slots(length).items():
        head = 2 * (HEAD_DIM * bits // 8 + 4) + 1  # keys and values: codes, float16 scale and zero; place in its block
        slot = heads * (head + 2 * pending) + 4  # attention received so far; where the block starts
        live += count * slot
        # A pending block has a segment of its own. Those of settled tokens have room for the next two blocks' share
        # (at most `FIRST_SLOTS` slots) or for a part of what is held.
        appended = BLOCK // 4 if bits == 4 else BLOCK * 3 // 4
        spare = 0 if pending or not count else max(min(2 * appended, FIRST_SLOTS), count / SPARE_SHARE)
        most += (count + spare) * slot
    return live, most


def test_memory_and_time_of_one_long_text(model):
    cache = PackedKVCache(model.config, block=BLOCK, sinks=0, centre="none")
    driver = Watching(model, cache, SCHEDULE)
    result = decode(CachedModel(model, cache, driver), random_ids(1, 40), max_new_tokens=TOKENS, temperature=1.0)
    assert result.token_ids.shape == (1, 40 + TOKENS)
    assert cache.get_seq_length() == 40 + TOKENS
    held = {(s.key_bits, s.pending): b.slots for s, b in cache.stores[0].layout.buckets.items() if b.slots}
    assert held == {stage: count for stage, count in slots(40 + TOKENS).items() if count}
    length, stored, live, resident, spent = (np.array(column) for column in zip(*driver.seen))
    for at, stored_now, live_now in zip(length.tolist(), stored.tolist(), live.tolist()):
        predicted, most = predicted_bytes(at)
        assert live_now == predicted, f"after {at} tokens"
        assert live_now <= stored_now <= most, f"after {at} tokens"
    # Twice the tokens cost at most twice the time a step: processor time, which other processes do not lengthen.
    steps = 1000 * np.diff(spent) / np.diff(length)
    time_at = {share: np.median(steps[int(share * len(steps)) - 4 :][:4]) for share in (0.25, 0.5, 1.0)}
    settled = length >= TOKENS / 4
    bits = 8 * live[-1] / (2 * LAYERS * KV_HEADS * HEAD_DIM * length[-1])
    print(f"\n{TOKENS} tokens, {spent[-1] - spent[0]:.0f} s of processor time")
    print(f"stored {stored[-1]:,} bytes, live {live[-1]:,}")
    print(f"{bits:.2f} bits a number, everything counted")
    print(f"resident {resident[settled][0] / MIB:.1f} -> {resident[-1] / MIB:.1f} MiB from a quarter to the end")
    print(f"ms of it a token at a quarter, half, end: {', '.join(f'{t:.2f}' for t in time_at.values())}")
    # What the cache does not explain stays as it was after the first quarter.
    unexplained = (resident - stored)[settled]
    assert unexplained.max() - unexplained[0] < 16 * MIB
    assert time_at[0.5] < 2 * 1.25 * time_at[0.25]
    assert time_at[1.0] < 2 * 1.25 * time_at[0.5]


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())  # a proxy may have lost its object


def test_many_texts_on_one_cache_leave_nothing_behind(model):
    cache = PackedKVCache(model.config, block=BLOCK)
    driver = PolicyDriver(model, cache, SCHEDULE)
    texts, stored, resident, tensors = [], [], [], []
    for number in range(SEQUENCES):
        cache.reset()
        driver.reset()
        assert cache.stored_bytes() == 0
        seed = number % 50
        cached = CachedModel(model, cache, driver)
        result = decode(cached, random_ids(1, 130, seed), max_new_tokens=6, temperature=1.0, seed=seed)
        texts.append(result.token_ids)
        stored.append(cache.stored_bytes())
        if number >= 50:
            resident.append(resident_bytes())
            assert torch.equal(texts[number], texts[seed])  # what came before does not matter
        if number in (50, SEQUENCES - 1):
            tensors.append(tensors_alive() - len(texts))
    assert len(set(stored)) == 1
    assert tensors[0] == tensors[1]
    assert max(resident) - resident[0] < 8 * MIB
    print(f"\n{SEQUENCES} texts: {stored[0]:,} bytes after each")
    print(f"resident {resident[0] / MIB:.1f} -> {resident[-1] / MIB:.1f} MiB from the 50th to the last")
