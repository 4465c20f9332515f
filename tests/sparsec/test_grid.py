"""Grids of integers times a scale are found in floating-point weights exactly, and never where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.grid import on_fp8_grid, on_grid
from sparsec.passes.quantize.contract import Grid


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([0, 16, 32]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    k=st.integers(1, 100),
    density=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**16),
)
def test_what_rounding_to_nearest_leaves_is_found_again(
    bits: int, group: int, dtype: torch.dtype, k: int, density: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(5, k) * (torch.rand(5, k) < density)
    left = Grid(bits, group).nearest(weight).to(dtype)
    found = on_grid(left, bits, group)
    if dtype == torch.float32:
        assert found is not None
    if found is not None:  # products rounded to 16 bits may fit no scale; what is found must be exact
        assert torch.equal(found.weight(dtype), left)
        assert int(found.q.abs().max()) <= 2 ** (bits - 1) - 1
        assert found.scale.shape == (5, -(-k // group) if group else 1)


def test_most_weights_of_16_bits_are_found_again() -> None:
    torch.manual_seed(0)
    hits = 0
    for _ in range(20):
        left = Grid(4, 32).nearest(torch.randn(1, 32)).to(torch.bfloat16)
        hits += on_grid(left, 4, 32) is not None
    assert hits >= 18


@pytest.mark.parametrize("bits", [4, 8])
def test_real_weights_are_on_no_grid(bits: int) -> None:
    torch.manual_seed(0)
    assert on_grid(torch.randn(32, 256), bits, 64) is None
    assert on_grid(torch.randn(32, 256).bfloat16(), bits, 128) is None
    assert on_grid(torch.zeros(0, 8), bits) is None


def test_one_value_off_the_grid_is_noticed() -> None:
    left = Grid(4, 32).nearest(torch.randn(8, 64))
    left[3, 40] *= 1.001
    assert on_grid(left, 4, 32) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("stretch", [1.0, 1.17, 3.0])
def test_e4m3_with_a_scale_a_row_is_found_in_plain_numbers(dtype: torch.dtype, stretch: float) -> None:
    """``stretch``: over the scale that the largest value of a row has, so that it is not 448 there."""
    torch.manual_seed(0)
    for _ in range(5):
        weight = torch.randn(40, 256) * (torch.rand(40, 256) < 0.5) * torch.rand(40, 1)
        weight[7] = 0
        scale = (weight.abs().amax(1) / 448 * stretch).clamp(min=1e-6)
        q = (weight / scale[:, None]).to(torch.float8_e4m3fn)
        plain = (q.float() * scale[:, None]).to(dtype)
        found = on_fp8_grid(plain)
        assert found is not None
        assert torch.equal(found.weight(dtype), plain)
        given = on_fp8_grid(plain, scale)
        assert given is not None
        assert torch.equal(given.q.float(), q.float())


def test_what_is_no_e4m3_is_not_found() -> None:
    torch.manual_seed(0)
    assert on_fp8_grid(torch.randn(40, 256).bfloat16()) is None
    plain = torch.randint(8, 15, (40, 256)).bfloat16()
    assert on_fp8_grid(plain) is not None
    plain[39, 255] = 13.5  # of the five bits that this has, e4m3 keeps four
    assert on_fp8_grid(plain) is None
    for value in (float("nan"), float("inf")):
        plain[39, 255] = value
        assert on_fp8_grid(plain) is None
        assert on_fp8_grid(plain, torch.ones(40)) is None


def test_zeros_of_e4m3_have_no_sign() -> None:
    found = on_fp8_grid(torch.tensor([[-0.0, 1.0, -2.0]]).half())
    assert found is not None
    assert found.q.view(torch.uint8)[0, 0] == 0
