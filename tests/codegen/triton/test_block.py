"""``block`` on GPUs: a compressed sparse row of whole blocks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import pack_verified
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import check


@settings(max_examples=14, deadline=None)
@given(
    size=st.sampled_from(["16x16", "32x32", "64x64", "16x64", "128x16"]),
    values=st.sampled_from(["bf16", "fp16", "fp32"]),
    m=st.integers(1, 8),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    size: str, values: str, m: int, n: int, k: int, density: float, act: str, bias: bool, seed: int
) -> None:
    check(f"block:{size}+{values}", "mma", m, n, k, density=density, act=act, bias=bias, seed=seed)


@pytest.mark.parametrize("size", ["16x16", "64x64", "128x128"])
def test_many_rows_of_x_go_through_tiles(size: str) -> None:
    check(f"block:{size}+bf16", "mma", 70, 200, 200, density=0.5, configs=2)


def test_splits_give_the_same_sums_whatever_runs_first() -> None:
    check("block:16x16+bf16", "mma", 2, 16, 1024, density=0.7, configs=6)


def test_full_block_rows_come_first() -> None:
    weight = torch.zeros(48, 64)
    weight[16:32, :] = 1.0
    weight[40, 20] = 1.0
    packed = pack_verified(weight, Format.parse("block:16x16+fp32"), "test")
    assert packed.tensors[3].tolist() == [1, 2, 0]
    assert packed.tensors[2].tolist() == [0, 4, 5, 5]
    assert packed.tensors[1][:5].tolist() == [0, 1, 2, 3, 1]


def test_other_shapes_of_blocks_are_refused() -> None:
    with pytest.raises(PatternMismatch, match="16, 32, 64 or 128"):
        pack_verified(torch.zeros(8, 8), Format.parse("block:8x8+fp32"), "test")
