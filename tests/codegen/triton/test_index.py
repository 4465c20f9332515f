"""``index`` on GPUs: blocks of eight values with a base column."""

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


@settings(max_examples=12, deadline=None)
@given(
    values=st.sampled_from(["bf16", "fp16", "fp32", "int8"]),
    m=st.integers(1, 8),
    n=st.integers(1, 70),
    k=st.integers(1, 600),
    density=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    values: str, m: int, n: int, k: int, density: float, act: str, bias: bool, seed: int
) -> None:
    check(f"index+{values}", "gather", m, n, k, density=density, act=act, bias=bias, seed=seed)


def test_splits_give_the_same_sums_whatever_runs_first() -> None:
    check("index+bf16", "gather", 1, 16, 4096, density=0.5, configs=6)


def test_values_far_apart_start_a_block_of_their_own() -> None:
    weight = torch.zeros(2, 3000)
    weight[0, ::300] = 1.0
    packed = pack_verified(weight, Format.parse("index+fp32"), "test")
    assert packed.tensors[3].tolist() == [0, 10 * 16]


def test_rows_wider_than_16_bits_are_refused() -> None:
    with pytest.raises(PatternMismatch, match="16 bits"):
        pack_verified(torch.zeros(1, 2**16 + 1), Format.parse("index+fp32"), "test")


def test_values_that_are_on_no_int8_grid_are_refused() -> None:
    with pytest.raises(PatternMismatch, match="int8"):
        pack_verified(torch.randn(4, 64), Format.parse("index+int8"), "test")


def test_int8_values_come_back_in_the_dtype_of_the_weight() -> None:
    weight = (torch.randint(-127, 128, (5, 40)) * 0.03125).half()
    weight[:, 0] = 127 * 0.03125
    assert pack_verified(weight, Format.parse("index+int8"), "test").tensors[2].dtype == torch.int32
