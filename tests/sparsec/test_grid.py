"""Grids of integers times a scale are found in floating-point weights exactly, and never where there is none."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.grid import on_grid
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
