"""Features against hand-computed cases, and policies on them."""

import math

import pytest
import torch

from helpers.cache.attention.variance import row_variance
from helpers.policies.features import TokenFeatures, confidence_of, entropy_of, log_probabilities
from helpers.policies.rarity import TokenCounts
from helpers.policies.rules import EntropyRule, FixedBits, RandomBits


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return entropy_of(log_probabilities(logits))


def attention_variance(weights: torch.Tensor) -> torch.Tensor:
    """Mean over heads of the spread of each query's attention: `[..., heads, queries, keys]` to `[..., queries]`."""
    queries, keys = weights.shape[-2:]
    return row_variance(weights, torch.arange(keys - queries + 1, keys + 1)).mean(dim=-2)


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.25, 0.25, 0.0], [1.0, 0.0, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]])
    expected = [1.5 * math.log(2), 0.0, math.log(4)]
    assert entropy(p.log()).tolist() == pytest.approx(expected, abs=1e-6)
    assert confidence_of(log_probabilities(p.log())).tolist() == pytest.approx([0.5, 1.0, 0.25])


def test_entropy_is_computed_in_float32_whatever_the_logits_are():
    logits = torch.randn(3, 1000).half()
    assert entropy(logits).dtype == torch.float32
    assert torch.equal(entropy(logits), entropy(logits.float()))
    assert entropy(logits.double()).dtype == torch.float64


def test_entropy_ignores_a_shift_of_the_logits():
    logits = torch.randn(5, 50)
    assert torch.allclose(entropy(logits), entropy(logits + 100), atol=1e-4)


def test_rarity_gives_the_published_rows():
    """Eight new tokens in a row: 0, then ln 3, ln 5, ln 7, ..."""
    rarity = TokenCounts().rarity(range(10))
    assert rarity == pytest.approx([math.log(2 * i + 1) for i in range(10)])
    assert rarity[1:4] == pytest.approx([1.098612, 1.609438, 1.945910], abs=1e-6)


def test_rarity_counts_what_came_before():
    counts = TokenCounts()
    assert counts.rarity([5, 5, 5]) == pytest.approx([0.0, -math.log(2 / 3), -math.log(3 / 4)])
    # Four tokens, two distinct ones so far; token 5 was seen three times.
    assert counts.rarity([6]) == pytest.approx([-math.log(1 / (3 + 1 + 1))])
    assert counts.rarity([5]) == pytest.approx([-math.log(4 / (4 + 2 + 1))])


def test_a_copy_of_the_counts_goes_its_own_way():
    counts = TokenCounts()
    counts.rarity([1, 2])
    counts.copy().rarity([1, 1, 1])
    assert counts.rarity([1]) == pytest.approx([-math.log(2 / 5)])


def test_attention_variance_by_hand():
    # Two heads, two queries over three keys: the first query sees two keys, the second all three.
    weights = torch.tensor([[[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]]])
    first = (0.0 + 0.25) / 2  # even: 0; all on one of two keys: 1/2 - 1/4
    second = (1 / 3 - 1 / 9 + 0.0) / 2
    assert attention_variance(weights)[0].tolist() == pytest.approx([first, second], abs=1e-6)


def test_the_caches_attention_variance_is_that_of_the_formula():
    from conftest import left_padded, random_ids, tiny_model
    from test_kv_cache import feed

    from helpers.cache.kv_cache import PackedKVCache

    ids = random_ids(2, 40)
    eager = tiny_model("llama", dtype=torch.float64, packed=False)
    eager.set_attn_implementation("eager")
    weights = eager(input_ids=ids, output_attentions=True).attentions[-1]
    model = tiny_model("llama", dtype=torch.float64)
    cache = PackedKVCache(model.config, block=8)
    cache.record_variance = True
    got = []
    for at, chunk in ((0, 24), (24, 1), (25, 15)):
        feed(model, cache, ids[:, at : at + chunk])
        got.append(cache.attention_variance)
    assert torch.allclose(torch.cat(got, 1), attention_variance(weights), atol=1e-10)

    batch = left_padded([40, 30])
    cache = PackedKVCache(model.config, block=8)
    cache.record_variance = True
    feed(model, cache, batch["input_ids"], batch["attention_mask"])
    alone = PackedKVCache(model.config, block=8)
    alone.record_variance = True
    feed(model, alone, batch["input_ids"][1:, 10:])
    assert torch.allclose(cache.attention_variance[1, 10:], alone.attention_variance[0], atol=1e-10)


def test_the_rule_gives_the_published_rows():
    published = {1.377800: 2, 3.797291: 4, 5.129652: 8, 7.871669: 16, 2.877511: 4, 4.657082: 8}
    features = TokenFeatures(entropy=torch.tensor([list(published)]))
    assert EntropyRule().widths(features, 1, 6).tolist() == [list(published.values())]


def test_the_rule_at_its_thresholds():
    features = TokenFeatures(entropy=torch.tensor([[0.0, 1.9999, 2.0, 4.0, 5.9999, 6.0]]))
    assert EntropyRule().widths(features, 1, 6).tolist() == [[2, 2, 4, 8, 8, 16]]
    assert EntropyRule((0.5, 1.0, 1.5)).widths(features, 1, 6).tolist() == [[2, 16, 16, 16, 16, 16]]


def test_random_widths_have_their_shares_and_their_seed():
    shares = (0.1, 0.6, 0.3, 0.0)
    widths = RandomBits(shares, seed=3).widths(TokenFeatures(), 4, 5000)
    measured = [(widths == bits).float().mean().item() for bits in (2, 4, 8, 16)]
    assert measured == pytest.approx(shares, abs=0.02)
    assert torch.equal(widths, RandomBits(shares, seed=3).widths(TokenFeatures(), 4, 5000))
    assert not torch.equal(widths, RandomBits(shares, seed=4).widths(TokenFeatures(), 4, 5000))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FixedBits(5), "must be one of"),
        (lambda: EntropyRule((4.0, 2.0, 6.0)), "three rising entropies"),
        (lambda: EntropyRule((1.0, 2.0)), "three rising entropies"),
        (lambda: RandomBits((0.5, 0.5, 0.5, 0.0)), "sum to 1"),
        (lambda: RandomBits((1.5, -0.5, 0.0, 0.0)), "non-negative"),
    ],
)
def test_bad_policies_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
