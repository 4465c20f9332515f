"""``dense`` with quantised values on GPUs, and the finders of ternary and codebook values."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import family, pack_verified, values
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.launch import run
from sparsec.codegen.triton.samples import sample_weight
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from tests.codegen.triton.checks import check

KINDS = ("int4g128", "int4g32", "int4", "int8", "int8g128", "ternary", "codebook")


@settings(max_examples=14, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    loop=st.sampled_from(["gemv", "mma"]),
    m=st.integers(1, 4),
    n=st.integers(1, 30),
    k=st.integers(1, 700),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    kind: str, loop: str, m: int, n: int, k: int, act: str, bias: bool, seed: int
) -> None:
    check(f"dense+{kind}", loop, m, n, k, act=act, bias=bias, seed=seed, configs=2)


@pytest.mark.parametrize("kind", ["int4g64", "ternary"])
def test_splits_give_the_same_sums_whatever_runs_first(kind: str) -> None:
    check(f"dense+{kind}", "gemv", 1, 4, 8192, configs=5)
    check(f"dense+{kind}", "mma", 1, 4, 2048, configs=4)


def test_many_rows_of_x_go_through_tiles() -> None:
    check("dense+int4g128", "mma", 70, 130, 256, configs=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["int4g64", "int8", "ternary", "codebook"])
def test_weights_and_x_of_other_dtypes_lose_nothing(kind: str, dtype: torch.dtype) -> None:
    format = Format.parse(f"dense+{kind}")
    weight = sample_weight(format, 6, 192).to(dtype)
    packed = pack_verified(weight, format, "test")
    x = torch.randn(2, 192).to(dtype)
    y = torch.empty(2, 6, dtype=dtype)
    chosen = family("dense")
    for loop in chosen.loops:
        run(chosen.launches(packed, loop, Call(x, y), chosen.configs(packed, loop, 2, 90)[0]))
        torch.testing.assert_close(
            y, reference.linear(x, weight), rtol=2e-3, atol=2e-3 if dtype.itemsize == 2 else 2e-5
        )


@pytest.mark.parametrize("kind", values.BITS)
def test_words_give_their_codes_back(kind: str) -> None:
    codes = torch.randint(0, 2 ** values.BITS[kind], (3, 2 * values.width(kind)))
    assert torch.equal(values.from_words(values.to_words(codes, kind), kind), codes)


def test_codes_of_a_word_stand_in_bits_of_their_own() -> None:
    for kind, bits in values.BITS.items():
        used = sorted((values.bit_of(kind, j) + b) % 32 for j in range(32 // bits) for b in range(bits))
        assert used == list(range(32)), kind


def test_int4_takes_four_bits_and_a_scale_for_a_group() -> None:
    packed = pack_verified(sample_weight(Format.parse("dense+int4g128"), 16, 1024), Format.parse("dense+int4g128"), "")
    assert packed.bytes == 16 * (1024 // 2 + 1024 // 128 * 2)


def test_scales_that_16_bits_do_not_hold_stay_fp32() -> None:
    weight = torch.tensor([[7.0, -3.0, 1.0, 0.0] * 32]) * 0.1
    packed = pack_verified(weight.bfloat16(), Format.parse("dense+int4g128"), "test")
    assert packed.tensors[1].dtype in (torch.float32, torch.bfloat16)
    assert pack_verified(weight, Format.parse("dense+int4g128"), "test").tensors[1].dtype == torch.float32


def test_the_first_row_that_is_on_no_grid_is_named() -> None:
    weight = sample_weight(Format.parse("dense+int4"), 40, 128)
    weight[23] = torch.randn(128).bfloat16()
    with pytest.raises(PatternMismatch, match="row 23 "):
        pack_verified(weight, Format.parse("dense+int4"), "test")


def test_a_row_with_two_magnitudes_is_not_ternary() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.0], [2.0, 1.0, 2.0]])
    with pytest.raises(PatternMismatch, match=r"row 1 .* column 1"):
        pack_verified(weight, Format.parse("dense+ternary"), "test")


def test_seventeen_values_need_more_than_a_codebook() -> None:
    format = Format.parse("dense+codebook")
    pack_verified(torch.arange(32).remainder(16).float()[None], format, "test")
    with pytest.raises(PatternMismatch, match="row 0 has more than 16"):
        pack_verified(torch.arange(17.0)[None], format, "test")


@pytest.mark.parametrize("kind", KINDS)
def test_values_that_are_not_finite_are_refused(kind: str) -> None:
    weight = sample_weight(Format.parse(f"dense+{kind}"), 2, 256)
    weight[1, 3] = float("nan")
    with pytest.raises(PatternMismatch):
        pack_verified(weight, Format.parse(f"dense+{kind}"), "test")


def test_zeros_are_values_like_any_other() -> None:
    for kind in KINDS:
        pack_verified(torch.zeros(2, 130), Format.parse(f"dense+{kind}"), "test")
