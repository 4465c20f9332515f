"""``block:1x16+int4g16`` on GPUs: whole groups of a row, in four bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import pack_verified
from sparsec.codegen.triton.samples import sample_weight
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import check

NAME = "block:1x16+int4g16"


@settings(max_examples=12, deadline=None)
@given(
    loop=st.sampled_from(["gemv", "mma"]),
    m=st.integers(1, 4),
    n=st.integers(1, 40),
    k=st.integers(1, 700),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    loop: str, m: int, n: int, k: int, density: float, act: str, bias: bool, seed: int
) -> None:
    check(NAME, loop, m, n, k, density=density, act=act, bias=bias, seed=seed, configs=2)


def test_splits_give_the_same_sums_whatever_runs_first() -> None:
    check(NAME, "gemv", 1, 16, 2048, density=0.5, configs=6)
    check(NAME, "mma", 1, 16, 512, density=0.5, configs=6)


def test_many_rows_of_x_go_through_tiles() -> None:
    check(NAME, "mma", 40, 70, 256, density=0.5, configs=2)


def test_rows_of_like_counts_stand_together() -> None:
    weight = torch.zeros(32, 128)
    weight[1::2] = 1.0
    packed = pack_verified(weight, Format.parse(NAME), "test")
    assert packed.tensors[3].tolist() == [0, 16 * 4, 16 * 4]
    assert packed.tensors[4].tolist() == [*range(1, 32, 2), *range(0, 32, 2)]


def test_a_kept_weight_takes_six_bits() -> None:
    packed = pack_verified(sample_weight(Format.parse(NAME), 16, 1024, density=1.0), Format.parse(NAME), "test")
    words, column, scale = packed.tensors[:3]
    assert sum(t.numel() * t.element_size() for t in (words, column, scale)) == 16 * 1024 * 6 // 8


def test_other_groups_are_refused() -> None:
    for name in ("block:1x32+int4g16", "block:1x16+int4g32", "block:1x16+bf16"):
        with pytest.raises(PatternMismatch, match="1x16 with int4g16"):
            pack_verified(torch.zeros(2, 64), Format.parse(name), "test")
