"""Input that cannot be right is refused with a message that names it; each case asserts what the user reads.

Cases that sit with their subject: widths and block sizes (`test_quantization`, `test_kv_cache`), schedules
(`test_policies`), columns of a table (`test_collection`), controller files (`test_controller`,
`test_nothing_let_in`), thresholds, percentiles, tokenizers and prompts of the gate (`test_gate`), text files and empty
texts (`test_sources`).
"""

import math

import numpy as np
import pytest
import torch
from conftest import left_padded, random_ids, tiny_config, tiny_model
from test_gate import PROMPTS, TEXTS, make_model, make_tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

from helpers.cache.kv_cache import PackedKVCache
from helpers.cache.plan import Step
from helpers.gate.gate import EntropyGate
from helpers.gate.generation import gated_generate
from helpers.policies.cached_model import CachedModel, score_blocks
from helpers.policies.decoding import decode
from helpers.policies.driver import PolicyDriver
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits
from helpers.training.collection import collect
from helpers.training.table import COLUMNS, read_training_data

RULE = EntropyRule((3.9, 4.1, 4.25))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def pair():
    tokenizer = make_tokenizer()
    return make_model(tokenizer, 0), make_model(tokenizer, 1), tokenizer


# Keys, values and logits that are no numbers


def filled(layers: int = 2, tokens: int = 24, rows: int = 2, block: int = 8, quantizer: str = "rotated", spoil=None):
    """A cache with `tokens` random tokens in its tail; `spoil` may change the keys or values of a layer before."""
    cache = PackedKVCache(tiny_config("llama", layers=layers), block=block, quantizer=quantizer)
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        keys, values = torch.randn(2, rows, 2, tokens, 32, generator=generator)
        if spoil is not None:
            spoil(layer, keys, values)
        cache.update(keys, values, layer)
    return cache


def one_number(side: str, value: float, token: int = 19):
    def spoil(layer, keys, values):
        if layer == 1:
            (keys if side == "keys" else values)[1, 0, token, 5] = value

    return spoil


MIXED = np.random.default_rng(0).choice([2, 4, 8, 16], size=(2, 8))


@pytest.mark.parametrize("bits", [2, 4, 8, 16, (8, 4), MIXED], ids=["2", "4", "8", "16", "8-4", "mixed"])
@pytest.mark.parametrize("quantizer", ["rotated", "minmax"])
@pytest.mark.parametrize("side", ["keys", "values"])
def test_a_number_that_is_none_is_found_at_the_commit_of_its_block(bits, quantizer, side):
    for value, message in (
        (math.nan, "keys or values of tokens 16 to 23 hold NaN or infinity: look for the first layer"),
        (math.inf, "keys or values of tokens 16 to 23 (hold NaN or infinity|are infinite)"),
        (-math.inf, "keys or values of tokens 16 to 23 (hold NaN or infinity|are infinite)"),
    ):
        cache = filled(quantizer=quantizer, spoil=one_number(side, value))
        cache.commit(4, 16)  # the blocks before are sound
        with pytest.raises(ValueError, match=message):
            cache.commit(bits, 8)


@pytest.mark.parametrize("bits", [2, 4, 8, 16, MIXED], ids=["2", "4", "8", "16", "mixed"])
def test_numbers_beyond_float16_are_named_as_such(bits):
    """What float32 and bfloat16 models may compute, and float16 scales (or float16 states) cannot hold."""
    cache = filled(spoil=one_number("values", 4e6))
    cache.commit(8, 16)
    message = "keys or values of tokens 16 to 23 are infinite or too large to be stored: .* they pass 65504"
    with pytest.raises(ValueError, match=message):
        cache.commit(bits, 8)
    large = filled(spoil=one_number("values", 6e4))  # large, but within float16
    large.commit(8, 16)
    large.commit(bits, 8)
    assert large.committed == 24


def test_after_a_reset_the_cache_is_as_good_as_new():
    cache = filled(spoil=one_number("keys", math.nan))
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        cache.commit(4)
    cache.reset()
    again = filled()
    for layer in range(len(cache.layers)):
        fresh = again.states(layer)
        cache.update(fresh.tail_keys, fresh.tail_values, layer)
    cache.commit(4)
    again.commit(4)
    assert all(torch.equal(a, b) for i in range(2) for a, b in zip(*(c.states(i).dense() for c in (cache, again))))


def test_a_cache_that_commits_by_itself_finds_it_too(model):
    broken = tiny_model("llama")
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = math.nan
    cache = PackedKVCache(broken.config, bits=4, block=8)
    with pytest.raises(ValueError, match="keys or values of tokens 0 to 15 hold NaN or infinity"):
        broken.generate(input_ids=random_ids(1, 20), cache=cache, max_new_tokens=4, do_sample=False)


def test_elsewhere_than_on_the_cpu_one_read_a_block_tells_widths_and_faults():
    """Where reading costs a wait, a verdict travels with the next widths; here the CPU stands in for the device."""
    cache = filled()
    bad, good = torch.tensor(math.nan), torch.tensor(1.0)
    cache.checks.waiting = [(good, "a", "b"), (bad, "the logits hold NaN", "b")]
    assert cache.stored_bytes() >= 8
    with pytest.raises(ValueError, match="the logits hold NaN"):
        cache.commit(torch.full((2, 8), 4))
    cache.checks.waiting = [(good, "a", "b")]
    widths = torch.tensor([[2, 4, 8, 16, 2, 4, 8, 16]] * 2)
    cache.commit(widths)
    assert cache.checks.waiting == []
    widths[:, :4] = 16  # sinks
    assert torch.equal(cache.token_bits()[:, :8], widths.float())
    with pytest.raises(ValueError, match="infinite"):
        cache.checks.expect(torch.tensor(math.inf), "nan", "infinite")


class BrokenHead(torch.nn.Module):
    """An output layer whose logits turn NaN or infinite from a call on."""

    def __init__(self, head, after: int, value: float = math.nan):
        super().__init__()
        self.head, self.calls, self.after, self.value = head, 0, after, value

    def forward(self, x):
        self.calls += 1
        logits = self.head(x)
        if self.calls > self.after:
            logits[..., 7] = self.value
        return logits


def with_broken_head(model, after: int, value: float = math.nan):
    model.lm_head = BrokenHead(model.lm_head, after, value)
    return model


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_stop_a_policy_that_reads_them(value):
    model = with_broken_head(tiny_model("llama"), after=2, value=value)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, RULE)
    message = r"logits of tokens 16 to 23 hold NaN or infinity: 'rule-based dynamic' has no entropy to choose by"
    with pytest.raises(ValueError, match=message):
        list(score_blocks(CachedModel(model, cache, driver), random_ids(2, 40), 8))
    assert cache.committed == 16


def test_collecting_stops_at_the_first_block_without_numbers(tmp_path):
    model = with_broken_head(tiny_model("llama"), after=20)
    with pytest.raises(ValueError, match=r"logits of tokens \d+ to \d+ hold NaN or infinity"):
        collect(model, [random_ids(1, 40)[0].tolist()], tmp_path / "t.csv", RULE, block=8)
    assert not (tmp_path / "t.csv").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_gate_names_logits_that_are_no_numbers(pair, value):
    _, large, tokenizer = pair
    broken = with_broken_head(make_model(tokenizer, 0), after=4, value=value)
    with pytest.raises(ValueError, match=r"logits hold NaN or infinity after 4 written token\(s\)"):
        gated_generate(broken, large, tokenizer, PROMPTS[0], EntropyGate(9.0), 20)
    broken.lm_head.after = broken.lm_head.calls + 2
    with pytest.raises(
        ValueError, match=r"logits hold NaN or infinity after \d+ of \d+ tokens of the calibration texts"
    ):
        EntropyGate.calibrate(broken, tokenizer, TEXTS, progress=False)


# Texts


def test_texts_beyond_the_context_are_refused_before_anything_is_computed(model, tmp_path):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=r"a text of 500 tokens and max_new_tokens=13 does not fit .* \(512 tokens\)"):
        decode(CachedModel(model, cache), random_ids(1, 500), max_new_tokens=13)
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match=r"a text of 513 tokens does not fit into the context of this llama model"):
        collect(model, [[3] * 40, [3] * 513], tmp_path / "t.csv", RULE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", [FixedBits(4), RULE, RandomBits()], ids=lambda p: p.name)
def test_a_prompt_of_one_token_is_a_prompt(model, policy):
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, policy)
    inputs = {"input_ids": random_ids(1, 1), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    out = model.generate(
        **driver.prefill(inputs), cache=cache, logits_processor=[driver], max_new_tokens=30, do_sample=False
    )
    assert out.shape == (1, 31)
    assert cache.committed == 24


def test_a_text_without_tokens_is_refused(model):
    empty = torch.zeros(1, 0, dtype=torch.long)
    for settings in ({"forced": True}, {"max_new_tokens": 3}):
        with pytest.raises(ValueError, match="input_ids holds no token"):
            decode(CachedModel(model), empty, **settings)
    cache = PackedKVCache(model.config)
    with pytest.raises(ValueError, match="input_ids holds no token"):
        PolicyDriver(model, cache, RULE).prefill({"input_ids": empty})
    with pytest.raises(ValueError, match="input_ids holds no token"):
        next(score_blocks(CachedModel(model, cache), empty))


# Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": -1}, "block must lie between 1 and 254 tokens, got -1"),
        ({"block": 8.0}, "block must lie between 1 and 254 tokens, got 8.0"),
        ({"block": None}, "block must lie between 1 and 254 tokens, got None"),
        ({"max_length": 0}, "max_length must be a number of tokens, 1 or more, got 0"),
        ({"max_length": -3}, "max_length must be a number of tokens, 1 or more, got -3"),
        ({"bits": math.nan}, r"bits must be one of \(2, 4, 8, 16\), got nan"),
        ({"bits": -4}, r"bits must be one of \(2, 4, 8, 16\), got -4"),
        ({"bits": ()}, r"bits must be a width or a pair \(key bits, value bits\), got \(\)"),
    ],
)
def test_settings_of_a_cache(arguments, message):
    with pytest.raises(ValueError, match=message):
        PackedKVCache(tiny_config("llama"), **arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Step(-1, 2), "after must be a number of blocks, 1 or more, got -1"),
        (lambda: Step(1, 2, keep=-0.1), "keep must be a share between 0 and 1, got -0.1"),
        (lambda: Step(1, 2, keep=math.nan), "keep must be a share between 0 and 1, got nan"),
        (lambda: EntropyRule((math.nan, 1.0, 2.0)), "thresholds must be three rising entropies in nats, got"),
        (lambda: RandomBits((math.nan, 0.5, 0.5, 0.0)), "shares must be four non-negative numbers that sum to 1, got"),
    ],
)
def test_settings_of_policies(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("count", [0, -1])
def test_as_many_blocks_as_there_are_can_be_settled(count):
    cache = filled()
    cache.commit(8, pending=True)
    with pytest.raises(ValueError, match=rf"blocks must lie between 1 and .* \(3\), got {count}"):
        cache.settle(8, 4, blocks=count)


@pytest.mark.parametrize("bits", [2, 4])
def test_heads_that_do_not_fill_bytes(bits):
    head_dim = {2: 6, 4: 9}[bits]
    cache = PackedKVCache(tiny_config("gpt2", head_dim), block=8)
    for layer in range(2):
        states = torch.randn(1, 4, 24, head_dim)
        cache.update(states, states, layer)
    with pytest.raises(ValueError, match=rf"head_dim must be a multiple of {8 // bits} to be packed at {bits} bits"):
        cache.commit(bits)


class Saying(FixedBits):
    """A policy that gives whatever it was told to."""

    plan = None

    def widths(self, features, batch, tokens):
        return ANSWERS[self.said](batch, tokens)


ANSWERS = {
    "a width that is none": lambda b, t: 5,
    "nothing": lambda b, t: None,
    "a word": lambda b, t: "4",
    "a width that is none in a tensor": lambda b, t: torch.full((b, t), 3),
    "NaN": lambda b, t: torch.full((b, t), math.nan),
    "fractions": lambda b, t: torch.full((b, t), 4.5),
    "a row too few": lambda b, t: torch.full((b - 1, t), 4),
    "a row of widths": lambda b, t: torch.full((t,), 4),
    "an array of another shape": lambda b, t: np.full((b, t + 8), 4),
    "a list": lambda b, t: [4] * t,
}
SAID = {
    "a row too few": r"static 4-bit: widths must have shape \[2, 16\], got \[1, 16\]",
    "a row of widths": r"static 4-bit: widths must have shape \[2, 16\], got \[16\]",
    "an array of another shape": r"static 4-bit: widths must have shape \[2, 16\], got \[2, 24\]",
    "a list": r"bits must be a width or a pair \(key bits, value bits\), got \[4, 4",
}


@pytest.mark.parametrize("said", ANSWERS)
def test_what_a_policy_may_not_say(model, said):
    policy = Saying(4)
    object.__setattr__(policy, "said", said)
    cache = PackedKVCache(model.config, block=8)
    driver = PolicyDriver(model, cache, policy)
    with pytest.raises(ValueError, match=SAID.get(said, r"bits must be one of \(2, 4, 8, 16\), got")):
        list(score_blocks(CachedModel(model, cache, driver), random_ids(2, 24), 16))
    assert cache.committed == 0


# Caches and models that do not belong together


def test_a_cache_of_fewer_layers_names_both(model):
    cache = PackedKVCache(tiny_config("llama", layers=1))
    with pytest.raises(ValueError, match="a model of 1 layers and got states of layer 2: use one cache per model"):
        model(input_ids=random_ids(1, 5), cache=cache)


def test_a_cache_of_more_layers_is_found_out_at_the_next_forward(model):
    cache = PackedKVCache(tiny_config("llama", layers=3))
    cache.config._attn_implementation = model.config._attn_implementation
    model(input_ids=random_ids(1, 5), cache=cache)
    with pytest.raises(ValueError, match=r"layers of the cache hold between 0 and 5 tokens: .* fewer than 3 layers"):
        model(input_ids=random_ids(1, 5), cache=cache)


def test_a_forward_that_broke_off_leaves_a_cache_that_says_so(model):
    cache = PackedKVCache(model.config, bits=4, block=8)
    model(input_ids=random_ids(1, 20), cache=cache)

    def stop(*_):
        raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        model(input_ids=random_ids(1, 3), cache=cache)
    hook.remove()
    with pytest.raises(ValueError, match="a forward was interrupted"):
        model(input_ids=random_ids(1, 3), cache=cache)
    cache.reset()
    model(input_ids=random_ids(1, 3), cache=cache)


def test_dtype_and_device_belong_to_the_cache(model):
    half = tiny_model("llama", dtype=torch.float16)
    cache = PackedKVCache(model.config, block=8)
    model(input_ids=random_ids(1, 20), cache=cache)
    with pytest.raises(
        ValueError, match=r"heads of 32 in torch.float32, the model sent 2 heads of 32 in torch.float16"
    ):
        half(input_ids=random_ids(1, 1), cache=cache)
    elsewhere = torch.zeros(1, 2, 1, 32, device="meta")
    with pytest.raises(ValueError, match="the cache lies on cpu, the model sent states on meta: reset the cache after"):
        cache.layers[0].update(elsewhere, elsewhere)
    keys = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match="the model sent 2 heads of 16"):
        cache.layers[0].update(keys, keys[..., :16])


def test_a_used_cache_and_another_batch(model):
    cache = PackedKVCache(model.config, bits=4)
    model.generate(**left_padded([20, 12]), cache=cache, max_new_tokens=3, do_sample=False)
    with pytest.raises(ValueError, match=r"holds 2 sequence\(s\), the model sent 1: reset it before another batch"):
        model.generate(**left_padded([30]), cache=cache, max_new_tokens=3, do_sample=False)


def test_a_model_whose_attention_cannot_be_exchanged():
    from helpers.cache.attention.dispatch import use_packed_attention

    class Fixed(AutoModelForCausalLM.from_config(tiny_config("llama")).__class__):
        def set_attn_implementation(self, name):
            pass

    with pytest.raises(ValueError, match="Fixed does not take attention functions; use the cache without this call"):
        use_packed_attention(Fixed(tiny_config("llama")))


# Tables


def write_csv(path, header=COLUMNS, row="1.5,0.0,0.01,4,3.2,1.0,0.5,0,0,17"):
    path.write_text(",".join(header) + "\n" + "".join(f"{line}\n" for line in [row] * 3))
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"header": ["extra", *COLUMNS], "row": "9,1.5,0.0,0.01,4,3.2,1.0,0.5,0,0,17"}, r"the first columns must be"),
        ({"header": COLUMNS[:5]}, "the first columns must be"),
        ({"header": COLUMNS[:8], "row": "1.5,0.0,0.01,4,3.2,1.0,0.5,0"}, r"missing column\(s\): position, token_id"),
        ({"row": "1.5,0.0,0.01,4,3.2,1.0,0.5,0,0"}, "column token_id holds NaN"),
        ({"row": "1.5,0.0,0.01,4,3.2,1.0,0.5,0,0,17\n1.5,1"}, "column attn_var holds NaN"),
        ({"row": "1.5,0.0,0.01,four,3.2,1.0,0.5,0,0,17"}, "column kv_bits is not numeric"),
        ({"row": "1.5,0.0,0.01,4,3.2,1.0,0.5,0,0,17\n1,2,3,4,5,6,7,8,9,10,11,12"}, "Error tokenizing data"),
        ({"row": "inf,0.0,0.01,4,3.2,1.0,0.5,0,0,17"}, "column entropy holds NaN or infinity"),
    ],
)
def test_tables_that_were_edited_are_named_with_their_fault(tmp_path, change, message):
    path = write_csv(tmp_path / "controller_training.csv", **change)
    with pytest.raises(ValueError, match=rf"controller_training\.csv: .*{message}"):
        read_training_data(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00\x01" * 50, b"\x00" * 100, b"PK\x03\x04" + bytes(range(256))])
def test_files_that_are_no_tables(tmp_path, content):
    path = tmp_path / "controller_training.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"controller_training\.csv: "):
        read_training_data(path)


def test_more_columns_after_the_agreed_ones_are_welcome(tmp_path):
    path = write_csv(tmp_path / "t.csv", [*COLUMNS, "surprisal"], "1.5,0.0,0.01,4,3.2,1.0,0.5,0,0,17,2.5")
    assert list(read_training_data(path).columns) == [*COLUMNS, "surprisal"]
