"""Products of which some outputs are read: rows of the weight for the others are not, and the results are right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import family, pack_verified
from sparsec.codegen.triton.chosen import FAMILY
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.gated import DTYPES
from sparsec.codegen.triton.launch import run
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, Pattern
from tests.codegen.triton.checks import allowed


def product(
    x: torch.Tensor, weight: torch.Tensor, needed: torch.Tensor, bias: torch.Tensor | None = None, act: str = "",
    config: int = 0,
) -> tuple[torch.Tensor, int]:  # fmt: skip
    """y, and how many outputs were computed."""
    values = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    packed = pack_verified(weight, Format(Pattern("panel"), values), "test", "select")
    y, count = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype), torch.zeros(1, dtype=torch.int32)
    configs = FAMILY.configs(packed, "select", len(x), 90)
    call = Call(x, y, bias, act, needed=needed, weight=weight, count=count)
    run(FAMILY.launches(packed, "select", call, configs[min(config, len(configs) - 1)]))
    return y, int(count)


@settings(max_examples=25, deadline=None)
@given(
    values=st.sampled_from(sorted(DTYPES)),
    m=st.integers(1, 8),
    n=st.integers(1, 1500),
    k=st.integers(1, 700),
    rows=st.integers(1, 8),
    kept=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    config=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_outputs_that_some_row_needs_are_the_references_and_the_others_zero(
    values: str, m: int, n: int, k: int, rows: int, kept: float, act: str, bias: bool, config: int, seed: int
) -> None:
    torch.manual_seed(seed)
    dtype = DTYPES[values]
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    needed = (torch.rand(rows, n) < kept) * torch.randn(rows, n)
    b = torch.randn(n).to(dtype) if bias else None
    y, count = product(x, weight, needed.to(dtype), b, act, config)
    read = (needed.to(dtype) != 0).any(0)
    assert count == int(read.sum())
    assert not y[:, ~read].any()
    off = (y.float() - reference.linear(x, weight, b, act).float()).abs() - allowed(x, weight, b)
    assert bool((off[:, read] <= 0).all())


def test_rows_of_the_weight_that_nobody_needs_are_not_read() -> None:
    weight, needed = torch.randn(40, 64), torch.ones(1, 40, dtype=torch.bool)
    weight[7], needed[0, 7] = float("nan"), False
    y, count = product(torch.randn(3, 64), weight, needed)
    assert count == 39
    assert bool(y.isfinite().all())


def test_a_weight_with_gaps_between_its_rows_is_read_right() -> None:
    wide, x = torch.randn(24, 160), torch.randn(2, 96)
    weight = wide[:, :96]
    assert weight.stride(0) == 160
    y, _ = product(x, weight, torch.ones(1, 24))
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


def test_what_nan_meets_is_needed() -> None:
    needed = torch.zeros(1, 16)
    needed[0, 3] = float("nan")
    assert product(torch.ones(1, 8), torch.ones(16, 8), needed)[1] == 1


def test_what_does_not_fit_is_refused() -> None:
    packed = FAMILY.pack(torch.zeros(8, 16), Format(Pattern("panel"), "fp32"), "test")
    assert not packed.tensors
    config = FAMILY.configs(packed, "select", 1, 90)[0]
    weight, needed = torch.zeros(8, 16), torch.zeros(1, 8)
    with pytest.raises(PatternMismatch, match="float32"):
        FAMILY.pack(weight, Format(Pattern("panel"), "bf16"), "test")
    call = Call(torch.zeros(9, 16), torch.zeros(9, 8), weight=weight, needed=needed)
    with pytest.raises(ValueError, match="8 rows"):
        FAMILY.launches(packed, "select", call, config)
    for more in ({}, {"weight": weight}, {"weight": weight.T, "needed": needed}, {"weight": weight, "needed": weight}):
        with pytest.raises(ValueError, match="which of 8 outputs are needed"):
            FAMILY.launches(packed, "select", Call(torch.zeros(1, 16), torch.zeros(1, 8), **more), config)
    assert family("chosen") is FAMILY
