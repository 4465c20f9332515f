"""Gated products on GPUs: dropped channels of x are not read, and the result is the reference's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.spec import ACTS
from sparsec.codegen.triton import family, pack_verified
from sparsec.codegen.triton.contract import Call, Gate
from sparsec.codegen.triton.gated import FAMILY
from sparsec.codegen.triton.launch import run
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, Pattern
from tests.codegen.triton.checks import allowed

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str, gate: Gate, config: int = 0
) -> torch.Tensor:
    values = next(name for name, dtype in DTYPES.items() if dtype == x.dtype)
    packed = pack_verified(weight, Format(Pattern("panel"), values), "test", "skip")
    y = torch.full((len(x), len(weight)), float("nan"), dtype=x.dtype)
    configs = FAMILY.configs(packed, "skip", len(x), 90)
    chosen = configs[min(config, len(configs) - 1)]
    run(FAMILY.launches(packed, "skip", Call(x, y, bias, act, gate=gate), chosen))
    return y


@settings(max_examples=25, deadline=None)
@given(
    values=st.sampled_from(sorted(DTYPES)),
    m=st.integers(1, 8),
    n=st.integers(1, 300),
    k=st.integers(1, 2500),
    kind=st.sampled_from(["exact", "scalar", "channel"]),
    kept=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    act=st.sampled_from(ACTS),
    bias=st.booleans(),
    config=st.integers(0, 12),
    seed=st.integers(0, 99),
)
def test_the_product_is_the_references(
    values: str, m: int, n: int, k: int, kind: str, kept: float, act: str, bias: bool, config: int, seed: int
) -> None:
    torch.manual_seed(seed)
    dtype = DTYPES[values]
    x = torch.rand(m, k) * (torch.randint(0, 2, (m, k)) * 2 - 1)
    gate: Gate = {"exact": None, "scalar": 1 - kept, "channel": torch.rand(k) * 2 * (1 - kept)}[kind]
    if kind == "exact":
        x *= torch.rand(m, k) < kept
    x, weight = x.to(dtype), torch.randn(n, k).to(dtype)
    b = torch.randn(n).to(dtype) if bias else None
    y = product(x, weight, b, act, gate, config)
    off = (y.float() - reference.gated_linear(x, weight, b, act, gate).float()).abs() - allowed(x, weight, b)
    assert bool((off <= 0).all()), float(off.max())


def test_the_list_is_ascending_and_holds_what_some_row_keeps() -> None:
    x = torch.zeros(2, 3000)
    x[0, [3, 1024, 2999]] = torch.tensor([1.0, -2.0, 3.0])
    x[1, [3, 7]] = torch.tensor([4.0, 0.25])
    packed = FAMILY.pack(torch.zeros(16, 3000), Format(Pattern("panel"), "fp32"), "test")
    call, config = Call(x, torch.empty(2, 16), gate=0.5), FAMILY.configs(packed, "skip", 2, 90)[0]
    lists = FAMILY.launches(packed, "skip", call, config)[0]
    run([lists])
    assert lists.args["COUNT"].tolist() == [3]
    assert lists.args["INDEX"][:3].tolist() == [3, 1024, 2999]
    assert lists.args["VALUE"][:, :3].tolist() == [[1.0, -2.0, 3.0], [4.0, 0.0, 0.0]]


def test_dropped_channels_are_not_read() -> None:
    weight, x = torch.randn(40, 64), torch.randn(1, 64)
    weight[:, 5], x[0, 5] = float("nan"), 0.25
    assert bool(product(x, weight, None, "", 0.25).isfinite().all())


def test_the_threshold_itself_is_dropped_as_eager_pytorch_rounds_it() -> None:
    x = torch.full((1, 16), 0.1, dtype=torch.bfloat16)  # 0.1 as bf16 is above 0.1
    assert product(x, torch.ones(8, 16, dtype=torch.bfloat16), None, "", 0.1).tolist() == [[0.0] * 8]


def test_an_infinite_weight_of_a_kept_channel_gives_infinity_not_nan() -> None:
    weight = torch.ones(8, 16)
    weight[0, 15] = float("inf")
    y = product(torch.ones(1, 16), weight, None, "", None)
    assert y[0].tolist() == [float("inf")] + [16.0] * 7


def test_nan_passes_the_exact_gate_and_not_a_threshold() -> None:
    x = torch.ones(1, 16)
    x[0, 3] = float("nan")
    weight = torch.ones(8, 16)
    assert bool(product(x, weight, None, "", None).isnan().all())
    assert product(x, weight, None, "", 0.5).tolist() == [[15.0] * 8]


def test_splits_do_not_change_the_result_from_run_to_run() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4096), torch.randn(64, 4096)
    first, again = (product(x, weight, None, "", 0.7) for _ in range(2))
    assert torch.equal(first, again)


def test_what_does_not_fit_is_refused() -> None:
    packed = FAMILY.pack(torch.zeros(8, 16), Format(Pattern("panel"), "fp32"), "test")
    config = FAMILY.configs(packed, "skip", 1, 90)[0]
    with pytest.raises(PatternMismatch, match="float32"):
        FAMILY.pack(torch.zeros(8, 16), Format(Pattern("panel"), "bf16"), "test")
    with pytest.raises(ValueError, match="8 rows"):
        FAMILY.launches(packed, "skip", Call(torch.zeros(9, 16), torch.zeros(9, 8)), config)
    with pytest.raises(ValueError, match="16 thresholds"):
        FAMILY.launches(packed, "skip", Call(torch.zeros(1, 16), torch.zeros(1, 8), gate=torch.zeros(8)), config)
    assert family("gated") is FAMILY
