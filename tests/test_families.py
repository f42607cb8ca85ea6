"""Every family of models on which packed caches are tried, as tiny random models; and the table that lists them."""

import copy

import pytest
import torch
from conftest import FAMILIES, HYBRIDS, WINDOW, left_padded, random_ids, tiny_config, tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from helpers.cache import Balance, PackedKVCache, use_packed_attention
from helpers.cache.kinds import describe_layers
from helpers.io.paths import ROOT
from helpers.training.key_moments import key_moments

EVERY = [*FAMILIES, *HYBRIDS]
LENGTH = 3 * WINDOW + 8  # far past every window
STATES = ("qwen3_next", "granitemoehybrid", "bamba", "jamba", "nemotron_h")  # whose layers keep a recurrent state
TABLE = ROOT / "helpers" / "README.md"
START, END = "<!-- families -->", "<!-- end families -->"


def read(model, cache, ids: torch.Tensor, prompt: int, chunk: int = 1) -> torch.Tensor:
    """Logits of a prompt and of what follows, `chunk` tokens at a time."""
    parts = [ids[:, :prompt], *(ids[:, at : at + chunk] for at in range(prompt, ids.shape[1], chunk))]
    with torch.no_grad():
        return torch.cat([model(input_ids=part, cache=cache).logits for part in parts], dim=1)


@pytest.mark.parametrize("name", EVERY)
def test_packed_at_16_bits_equals_the_library_past_every_window(name):
    model = tiny_model(name, dtype=torch.float64, packed=False, attention="eager")
    ids = random_ids(1, LENGTH)
    expected = read(model, DynamicCache(config=model.config), ids, prompt=40)
    use_packed_attention(model)
    cache = PackedKVCache(model.config, bits=16, block=8, max_length=LENGTH)
    actual = read(model, cache, ids, prompt=40)
    assert cache.committed > 0
    # 16-bit storage rounds to half precision, and models compute parts of themselves in float32.
    assert (actual - expected).abs().mean() < 1e-3 * expected.std()
    exact = read(model, PackedKVCache(model.config, block=8), ids, prompt=40)
    assert (exact - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("name", EVERY)
def test_packed_attention_reads_what_the_cache_hands_out_densely(name):
    model = tiny_model(name)
    ids = random_ids(2, 56)
    full = read(model, DynamicCache(config=model.config), ids, prompt=40, chunk=8)
    cache = PackedKVCache(model.config, bits=8, block=8)
    before = read(model, cache, ids[:, :48], prompt=40, chunk=8)
    twin = copy.deepcopy(cache)
    packed = read(model, cache, ids[:, 48:], prompt=8)
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    twin.config = model.config
    dense = read(model, twin, ids[:, 48:], prompt=8)
    assert (packed - dense).abs().max() < 1e-4
    error = (torch.cat([before, packed], dim=1) - full).abs().mean()
    assert 0 < error < (0.3 if "experts" in str(tiny_config(name)) else 0.05) * full.std()  # an expert may change


@pytest.mark.parametrize("name", EVERY)
def test_padded_rows_and_beams_generate_as_with_the_librarys_cache(name):
    model = tiny_model(name, dtype=torch.float64)
    batch = left_padded([30, 22])
    for settings in ({}, {"num_beams": 2}):
        settings |= {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected = model.generate(**batch, **settings, cache=DynamicCache(config=model.config))
        actual = model.generate(**batch, **settings, cache=PackedKVCache(model.config, block=8))
        assert torch.equal(actual, expected), settings


@pytest.mark.parametrize("name", [name for name in HYBRIDS if name not in STATES])
def test_tokens_are_taken_back_within_the_window(name):
    """Where the cache can: short of the window, or where it was told to record the past (convolutions)."""
    model = tiny_model(name, dtype=torch.float64)
    ids, more = random_ids(1, WINDOW - 4), random_ids(1, 4, seed=1)
    logits = []
    for cache in (DynamicCache(config=model.config), PackedKVCache(model.config, bits=16, block=8)):
        if name == "lfm2":
            cache.activate_past_recording()
        read(model, cache, ids, prompt=WINDOW - 4)
        cache.crop(-3)
        logits.append(read(model, cache, more, 4))
    assert (logits[0] - logits[1]).abs().mean() < 1e-3 * logits[0].std()


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "bamba"])
def test_tokens_that_cannot_be_taken_back_are_refused_and_nothing_is_lost(name):
    model = tiny_model(name)
    cache = PackedKVCache(model.config, bits=8, block=8)
    ids = random_ids(1, 40)
    read(model, cache, ids, prompt=40)
    with pytest.raises(ValueError, match=r"crop\(-3\): layer 0 .* call cache.activate_past_recording"):
        cache.crop(-3)
    assert cache.get_seq_length() == cache.packed[0].get_seq_length() == 40
    cache.crop(0)
    assert read(model, cache, random_ids(1, 4), 4).isfinite().all()


def test_past_the_window_tokens_are_taken_back_where_the_past_is_recorded():
    model = tiny_model("gemma3_text")
    caches = [PackedKVCache(model.config, bits=8, block=8) for _ in range(2)]
    caches[0].activate_past_recording()
    ids = random_ids(1, 60)
    read(model, caches[0], ids, prompt=60)
    caches[0].crop(-20)
    read(model, caches[1], ids[:, :40], prompt=40)
    more = random_ids(1, 6, seed=2)
    assert torch.allclose(read(model, caches[0], more, 6), read(model, caches[1], more, 6), atol=2e-2)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_special_scores_are_the_models_own(name):
    """Softcap and scores of nothing, which the library's fused attention leaves out, in full and packed reads."""
    model = tiny_model(name, dtype=torch.float64, packed=False, attention="eager")
    ids = random_ids(1, 50)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = use_packed_attention(model)(input_ids=ids).logits
    assert (plain - expected).abs().max() < 1e-5
    if name == "gemma2":
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
    else:
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(-30.0)
    with torch.no_grad():
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3, "the model's scores were not special"


def test_memory_of_a_hybrid_is_bounded_where_the_library_bounds_it_and_counted_by_kind():
    model = tiny_model("gemma3_text")
    cache = PackedKVCache(model.config, bits=4, block=8)
    read(model, cache, random_ids(1, 300), prompt=280)
    held = cache.bytes_by_kind()
    assert sum(held.values()) == cache.stored_bytes()
    library = DynamicCache(config=model.config)
    read(model, library, random_ids(1, 300), prompt=280)
    assert held["sliding_attention"] <= 1.1 * 2 * library.layers[0].keys.nbytes
    assert held["full_attention"] < 0.3 * 2 * library.layers[1].keys.nbytes
    assert cache.bits_per_element() < 9
    assert cache.token_bits().shape == (1, 300)


def test_a_prompt_leaves_no_more_of_a_window_than_the_window():
    """The library keeps a view of the whole prompt until the next token."""
    model = tiny_model("gemma3_text")
    cache = PackedKVCache(model.config, bits=4, block=8)
    read(model, cache, random_ids(1, 300), prompt=300)
    layer = cache.layers[0]
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes


def test_an_interrupted_forward_of_a_hybrid_is_noticed():
    model = tiny_model("gemma3_text")
    cache = PackedKVCache(model.config, bits=8, block=8)
    ids = random_ids(1, 30)
    read(model, cache, ids, prompt=30)
    cache.layers[0].update(*torch.zeros(2, 1, 2, 1, 32))
    with pytest.raises(ValueError, match="layer 0 of the cache holds 31 tokens and layer 1 30: a forward was interrup"):
        read(model, cache, ids[:, :1], 1)
    cache.reset()
    assert read(model, cache, ids, prompt=30).isfinite().all()


def test_a_reset_cache_reads_as_a_new_one():
    for name in ("gemma3_text", "bamba"):
        model = tiny_model(name)
        cache = PackedKVCache(model.config, bits=8, block=8)
        ids = random_ids(1, 40)
        first = read(model, cache, ids, prompt=32)
        cache.reset()
        assert torch.equal(read(model, cache, ids, prompt=32), first)


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "bamba"])
def test_keys_of_packed_layers_are_balanced(name):
    model = tiny_model(name)
    balance = Balance.of_moments(*key_moments(model, random_ids(3, 120).tolist()))
    assert balance.matrices.shape[0] == 1
    cache = PackedKVCache(model.config, bits=8, block=8, balance=balance)
    ids = random_ids(1, 60)
    full = read(model, DynamicCache(config=model.config), ids, prompt=40)
    actual = read(model, cache, ids, prompt=40)
    assert 0 < (actual - full).abs().mean() < 0.05 * full.std()


def test_what_is_packed_is_said_once(capsys):
    config = tiny_config("gemma3_text")
    for _ in range(3):
        cache = PackedKVCache(config, bits=4)
    assert cache.describe() == "packed: layer 1 of 2; as the library keeps them: 1 of type sliding_attention"
    assert capsys.readouterr().out.count("packed: layer 1 of 2") <= 1
    assert PackedKVCache(tiny_config("llama"), bits=4).describe() == "all 2 layers packed"


def test_models_that_cannot_be_served_are_refused_by_name():
    def refused(name: str, reason: str, **settings) -> None:
        with pytest.raises(ValueError, match=reason):
            PackedKVCache(AutoConfig.for_model(name, **settings))

    refused("mistral", "mistral has only sliding_attention.*sliding_window=64: set it to None", sliding_window=64)
    refused("t5", "t5 is an encoder-decoder model")
    for name in ("deepseek_v2", "deepseek_v3"):
        refused(name, f"{name} has latent attention")
    refused("mamba", "mamba has only linear_attention, so nothing would be packed")
    refused("falcon_h1", "falcon_h1 has only hybrid")


def test_a_model_that_computes_attention_by_itself_is_told_what_to_do():
    config = AutoConfig.for_model(
        "doge", vocab_size=97, hidden_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2,
        intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ids = random_ids(1, 30)
    expected = read(model, DynamicCache(config=config), ids, prompt=20)
    assert (read(model, PackedKVCache(config, bits=8, block=8), ids, prompt=20) - expected).abs().max() < 0.1
    use_packed_attention(model)
    with pytest.raises(AttributeError, match="use the cache without use_packed_attention"):
        read(model, PackedKVCache(config, bits=8, block=8), ids, prompt=20)


def families_table() -> str:
    lines = ["| family | layers of the tiny model that is tried |", "|---|---|"]
    lines += [f"| {', '.join(f'`{name}`' for name in FAMILIES)} | all of full attention, packed |"]
    for name in HYBRIDS:
        kinds = PackedKVCache(tiny_config(name)).kinds
        lines.append(f"| `{name}` | {describe_layers(kinds)} |")
    return "\n".join(lines)


def test_the_readme_lists_what_is_tested():
    text = TABLE.read_text(encoding="utf-8")
    shown = text[text.index(START) + len(START) : text.index(END)].strip()
    assert shown == families_table(), "run `python tests/test_families.py`, which writes the table"


if __name__ == "__main__":
    text = TABLE.read_text(encoding="utf-8")
    before, after = text[: text.index(START) + len(START)], text[text.index(END) :]
    TABLE.write_text(f"{before}\n{families_table()}\n{after}", encoding="utf-8")
