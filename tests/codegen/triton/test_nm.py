"""``nm`` on GPUs: N of every M, without offsets."""

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

PATTERNS = ("8:16", "4:8", "2:4", "1:4", "3:32")


@settings(max_examples=12, deadline=None)
@given(
    pattern=st.sampled_from([*PATTERNS, "5:7", "2:100", "6:6"]),
    values=st.sampled_from(["bf16", "fp16"]),
    m=st.integers(1, 8),
    n=st.integers(1, 40),
    k=st.integers(1, 300),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    pattern: str, values: str, m: int, n: int, k: int, act: str, bias: bool, seed: int
) -> None:
    check(f"nm:{pattern}+{values}", "gather", m, n, k, act=act, bias=bias, seed=seed)


@settings(max_examples=8, deadline=None)
@given(
    pattern=st.sampled_from(PATTERNS),
    values=st.sampled_from(["bf16", "fp16"]),
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    k=st.integers(1, 300),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_of_tiles_is_the_references(
    pattern: str, values: str, m: int, n: int, k: int, bias: bool, seed: int
) -> None:
    check(f"nm:{pattern}+{values}", "tile", m, n, k, bias=bias, seed=seed, configs=1)


def test_splits_give_the_same_sums_whatever_runs_first() -> None:
    check("nm:4:8+bf16", "gather", 2, 16, 1024, configs=6)
    check("nm:4:8+bf16", "tile", 2, 16, 512, configs=4)


def test_groups_that_keep_less_are_filled_up_with_zeros() -> None:
    weight = torch.zeros(1, 16, dtype=torch.bfloat16)
    weight[0, 6] = 1.0
    position, _ = pack_verified(weight, Format.parse("nm:2:8+bf16"), "test").tensors
    assert position[0, 0].item() & 0xFF == 0x60  # positions 0 and 6 of the first group


def test_a_group_that_keeps_more_is_named() -> None:
    weight = torch.zeros(3, 32, dtype=torch.bfloat16)
    weight[1, 8:13] = 1.0
    with pytest.raises(PatternMismatch, match="row 1 from column 8"):
        pack_verified(weight, Format.parse("nm:4:8+bf16"), "test")


def test_tiles_of_groups_that_are_no_power_of_two_are_refused() -> None:
    with pytest.raises(ValueError, match="not 7"):
        check("nm:5:7+bf16", "tile", 1, 4, 14)
