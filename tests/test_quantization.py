"""Codes, packing and rotation."""

import pytest
import torch

from helpers.cache import quantization
from helpers.cache.quantization import (
    WIDTHS,
    bytes_per_vector,
    check_width,
    dequantize,
    pack_codes,
    quantize,
    rotation_matrix,
    unpack_codes,
)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("n", [8, 32, 80, 128])
def test_packing_is_lossless_and_really_packed(bits, n):
    codes = torch.randint(0, 2**bits, (3, 5, n), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape[-1] == n * bits // 8 == bytes_per_vector(n, bits)
    assert torch.equal(unpack_codes(packed, bits), codes)


def test_a_packed_byte_by_hand():
    codes = torch.tensor([1, 2, 3, 0], dtype=torch.uint8)
    assert pack_codes(codes, 2).tolist() == [1 | 2 << 2 | 3 << 4 | 0 << 6]
    assert pack_codes(codes, 4).tolist() == [1 | 3 << 4, 2 | 0 << 4]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_error_is_within_half_a_step(bits):
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    packed, scales = quantize(x, bits, search=False, stretch=False)
    error = (dequantize(packed, scales, bits, x.dtype) - x).abs().amax(-1)
    # Scale and zero are rounded to float16, which may move the grid's ends by a relative 2^-11.
    assert (error <= 0.5 * scales[:, 0].float() + x.abs().amax(-1) * 2**-9).all()


def test_the_step_of_2_bits_is_searched():
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * 3 + 1
    found, plain = (dequantize(*quantize(x, 2, search, False), 2, x.dtype) for search in (True, False))
    assert (found - x).square().mean() < 0.6 * (plain - x).square().mean()


@pytest.mark.parametrize(("bits", "compiled"), [(2, True), (4, True), (2, False), (4, False)])
def test_what_comes_back_is_as_long_along_the_vector_as_the_vector(bits, compiled, monkeypatch):
    """So that a query in the direction of a key meets all of it; without it a 2-bit key is an eighth too short."""
    if not compiled:
        monkeypatch.setattr(quantization, "_compiled", lambda: None)
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 300)[:, None]
    back = dequantize(*quantize(x, bits), bits, x.dtype)
    along = (back * x).sum(-1) / x.square().sum(-1)
    assert torch.allclose(along, torch.ones(300), atol=2e-3)  # scale and zero are rounded once more
    bare = dequantize(*quantize(x, bits, search=False, stretch=False), bits, x.dtype)
    assert ((bare * x).sum(-1) / x.square().sum(-1) - 1).abs().mean() > 3 * (along - 1).abs().mean()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_constant_and_tiny_vectors_survive(bits):
    x = torch.stack([torch.zeros(32), torch.full((32,), 0.5), torch.linspace(0, 1e-8, 32)])
    back = dequantize(*quantize(x, bits), bits, x.dtype)
    assert torch.allclose(back, x, atol=1e-7)


def test_half_precision_codes_equal_those_of_the_same_numbers_in_float32():
    x = torch.randn(50, 32).half()
    assert torch.equal(quantize(x.float(), 4)[0], quantize(x.double(), 4)[0])


@pytest.mark.parametrize("head_dim", [8, 32, 64, 80, 96, 128])
def test_rotation_is_orthogonal_fixed_and_spreads_an_outlier(head_dim):
    rotation = rotation_matrix(head_dim)
    assert torch.allclose(rotation @ rotation.T, torch.eye(head_dim, dtype=torch.float64), atol=1e-12)
    assert torch.equal(rotation, rotation_matrix(head_dim))
    outlier = torch.zeros(head_dim, dtype=torch.float64)
    outlier[3] = 100.0
    assert (outlier @ rotation).abs().max() < 70


@pytest.mark.parametrize("bits", [0, 1, 3, 5, 32, "4", None])
def test_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match=r"bits must be one of \(2, 4, 8, 16\)"):
        check_width(bits)


def test_head_dim_that_does_not_fill_bytes_is_refused():
    with pytest.raises(ValueError, match="head_dim must be a multiple of 4"):
        bytes_per_vector(30, 2)
    assert [bytes_per_vector(64, bits) for bits in WIDTHS] == [16, 32, 64, 128]


def test_a_prompt_is_quantized_as_its_blocks_are(monkeypatch):
    """A CPU cuts what is large into pieces: vectors do not notice."""
    x = torch.randn(3, 5, 7, 32, generator=torch.Generator().manual_seed(0))
    for bits in (2, 4, 8):
        whole = quantize(x, bits)
        monkeypatch.setattr(quantization, "NUMBERS_AT_ONCE", 10 * 32)
        pieces = quantize(x, bits)
        monkeypatch.undo()
        assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
        assert pieces[0].shape == (3, 5, 7, 32 * bits // 8)
        assert pieces[1].shape == (3, 5, 7, 2)


@pytest.mark.parametrize("n", [4, 32, 64, 80, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_compiled_loops_do_what_tensor_operations_do(n, bits, monkeypatch):
    x = torch.randn(3, 500, n, generator=torch.Generator().manual_seed(n)) * 3 + 1
    x[0, 0], x[0, 1] = 1.5, 0.0  # constant vectors have a scale of zero
    codes, scales = quantize(x, bits)
    assert quantization._compiled() is not None
    monkeypatch.setattr(quantization, "_compiled", lambda: None)
    expected, expected_scales = quantize(x, bits)
    close = torch.isclose(scales.float(), expected_scales.float(), rtol=2**-9, atol=2**-23)  # the last digit
    differ = (codes != expected).any(-1) | ~close.all(-1)
    assert differ.float().mean() < 0.002, "more than ties between two grids"
    errors = [
        (dequantize(*each, bits, x.dtype) - x).square().sum(-1)
        for each in ((codes, scales), (expected, expected_scales))
    ]
    torch.testing.assert_close(*errors, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_compiled_loops_pass_on_that_a_number_is_not_finite(bad):
    x = torch.randn(3, 64)
    x[1, 5] = bad
    for bits in (2, 4, 8):
        assert torch.equal(quantize(x, bits)[1].isfinite().all(-1), torch.tensor([True, False, True]))
