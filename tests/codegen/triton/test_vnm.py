"""``vnm`` on GPUs: four columns for a block of rows, and N of those four for each row."""

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


@settings(max_examples=10, deadline=None)
@given(
    pattern=st.sampled_from(["64:2:8", "32:2:10", "64:1:16", "16:3:5"]),
    loop=st.sampled_from(["gather", "tile"]),
    values=st.sampled_from(["bf16", "fp16"]),
    m=st.integers(1, 8),
    n=st.integers(1, 130),
    k=st.integers(1, 300),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    pattern: str, loop: str, values: str, m: int, n: int, k: int, act: str, bias: bool, seed: int
) -> None:
    check(f"vnm:{pattern}+{values}", loop, m, n, k, act=act, bias=bias, seed=seed, configs=1)


def test_tiles_take_many_rows_of_x() -> None:
    check("vnm:64:2:8+bf16", "tile", 70, 64, 256, configs=2)


@settings(max_examples=6, deadline=None)
@given(
    pattern=st.sampled_from(["64:2:8", "32:2:10", "16:2:5"]),
    values=st.sampled_from(["bf16", "fp16"]),
    m=st.integers(1, 8),
    n=st.integers(1, 130),
    k=st.integers(1, 900),
    seed=st.integers(0, 99),
)
def test_two_of_four_columns_go_through_sparse_tensor_cores(
    pattern: str, values: str, m: int, n: int, k: int, seed: int
) -> None:
    check(f"vnm:{pattern}+{values}", "skinny", m, n, k, seed=seed, configs=1)


@pytest.mark.parametrize("pattern", ["64:1:8", "8:2:8"])
def test_sparse_tensor_cores_take_two_of_four_for_tiles_of_rows(pattern: str) -> None:
    with pytest.raises(PatternMismatch, match="V:2:M"):
        pack_verified(torch.zeros(64, 8, dtype=torch.bfloat16), Format.parse(f"vnm:{pattern}+bf16"), "test", "skinny")


def test_a_block_that_uses_a_fifth_column_is_named() -> None:
    weight = torch.zeros(128, 16, dtype=torch.bfloat16)
    weight[64:69, 8:13] = torch.eye(5)
    with pytest.raises(PatternMismatch, match="row 64 from column 8"):
        pack_verified(weight, Format.parse("vnm:64:2:8+bf16"), "test")


def test_a_row_that_keeps_three_of_four_is_refused() -> None:
    weight = torch.zeros(64, 8, dtype=torch.bfloat16)
    weight[3, 1:4] = 1.0
    with pytest.raises(PatternMismatch, match="keep more than 2, the first in row 3"):
        pack_verified(weight, Format.parse("vnm:64:2:8+bf16"), "test")
