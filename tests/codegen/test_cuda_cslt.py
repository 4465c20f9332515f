"""Dispatch to cuSPARSELt, with stand-ins for its operators that hold to its rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.cuda import cslt, families
from sparsec.codegen.cuda.cslt import E4M3, Cslt
from sparsec.codegen.triton.contract import Call
from sparsec.codegen.triton.quantize import by_torch
from sparsec.codegen.triton.samples import sample_weight
from sparsec.compat import CsltOps, cslt_ops
from sparsec.errors import PatternMismatch
from sparsec.formats import Format
from sparsec.grid import OnFp8


class StandIn:
    """The operators on dense tensors; refuses shapes as torch does."""

    def __init__(self) -> None:
        self.searched: list[tuple[int, ...]] = []
        self.algorithms: list[int] = []

    def compress(self, weight: torch.Tensor) -> torch.Tensor:
        multiple = 32 if weight.dtype == E4M3 else 16
        assert all(size % multiple == 0 for size in weight.shape)
        assert not bool((torch.signbit(weight.float()) & (weight.float() == 0)).any())
        return weight.clone()

    def search(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, alpha: torch.Tensor | None,
        out: torch.dtype | None,
    ) -> int:  # fmt: skip
        self.searched.append(tuple(x.shape))
        return 7

    def multiply(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, alpha: torch.Tensor | None,
        out: torch.dtype | None, algorithm: int,
    ) -> torch.Tensor:  # fmt: skip
        fp8 = x.dtype == E4M3
        assert x.shape[0] % (32 if fp8 else 16) == 0
        assert x.shape[1] % (16 if fp8 else 8) == 0
        assert fp8 == (alpha is not None) == (out is not None)
        assert not fp8 or not x.is_contiguous()  # torch asks for that of 8-bit operands
        assert alpha is None or (alpha.shape == weight.shape[:1] and alpha.dtype == torch.float32)
        assert bias is None or len(bias) == len(weight)
        self.algorithms.append(algorithm)
        y = weight.float() @ x.float()
        y = y if alpha is None else y * alpha[:, None]
        return (y if bias is None else y + bias.float()[:, None]).to(out or x.dtype).t().contiguous()


def dispatch() -> tuple[Cslt, StandIn]:
    stand_in = StandIn()
    return Cslt(CsltOps(stand_in.compress, stand_in.search, stand_in.multiply)), stand_in


@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(0, 20),
    n=st.integers(1, 40),
    k=st.integers(1, 70),
    bias=st.booleans(),
    act=st.sampled_from(["", "relu", "silu"]),
)
def test_shapes_are_padded_and_cut_again(m: int, n: int, k: int, bias: bool, act: str) -> None:
    torch.manual_seed(m)
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    weight[0, 0] = -0.0
    b = torch.randn(n).bfloat16() if bias else None
    sparse, _ = dispatch()
    y = sparse.linear(x, sparse.compress(weight), b, act)
    assert y.shape == (m, n)
    assert torch.allclose(y, reference.linear(x, weight, b, act), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_e4m3_has_scales_of_rows_of_both_sides(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for m, n, k, act in [(5, 40, 70, "silu"), (16, 32, 64, ""), (1, 3, 4, "relu"), (0, 8, 16, "")]:
        weight = OnFp8(torch.randn(n, k).to(E4M3), torch.rand(n) + 0.1)
        x, x_scale = by_torch(torch.randn(m, k) * 30)
        bias = torch.randn(n).to(dtype) if n > 3 else None
        sparse, _ = dispatch()
        y = sparse.linear_fp8(x, x_scale, sparse.compress_fp8(weight), bias, act, dtype)
        wide = (x.float() * x_scale[:, None]) @ weight.weight(torch.float32).T
        expected = reference.ACT[act](wide + (0 if bias is None else bias.float()))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), expected, atol=4e-2 * float(expected.abs().max() if m else 0), rtol=1e-2)


def test_searches_of_e4m3_and_of_bf16_are_kept_apart() -> None:
    sparse, stand_in = dispatch()
    wide = sparse.compress(torch.zeros(32, 64, dtype=torch.bfloat16))
    narrow = sparse.compress_fp8(OnFp8(torch.zeros(32, 64).to(E4M3), torch.ones(32)))
    for _ in range(2):
        sparse.linear(torch.zeros(16, 64, dtype=torch.bfloat16), wide)
        sparse.linear_fp8(torch.zeros(16, 64).to(E4M3), torch.ones(16), narrow, None, "", torch.bfloat16)
    assert stand_in.searched == [(64, 16), (64, 16)]


def test_the_family_packs_e4m3_and_gives_the_weight_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cslt, "unavailable", lambda fp8: "" if fp8 else "only e4m3 was asked for")
    family = families.CuSparseLt()
    family._products, _ = dispatch()
    format = Format.parse("nm:2:4+fp8")
    weight = sample_weight(format, 40, 72)
    packed = family.pack(weight, format, "key")
    assert torch.equal(family.unpack(packed), weight)
    x, y = torch.zeros(3, 72, dtype=weight.dtype), torch.zeros(3, 40, dtype=weight.dtype)
    assert [r.name for r in family.launches(packed, "cusparselt", Call(x, y), {})] == ["quantize", "cusparselt"]
    with pytest.raises(PatternMismatch, match="row 0 is not e4m3"):
        family.pack(torch.randn(40, 72).bfloat16(), format, "key")


def test_the_search_runs_once_for_a_shape() -> None:
    sparse, stand_in = dispatch()
    weight = sparse.compress(torch.zeros(32, 64, dtype=torch.bfloat16))
    for rows in (5, 8, 1, 9):  # three are eight after padding
        sparse.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
    assert stand_in.searched == [(64, 8), (64, 16)]
    assert stand_in.algorithms == [7] * 4


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    sparse, _ = dispatch()
    with pytest.raises(ValueError, match="bf16, fp16 and e4m3, not float32"):
        sparse.compress(torch.zeros(16, 16))
    with pytest.raises(ValueError, match="takes a matrix"):
        sparse.compress(torch.zeros(16))
    with pytest.raises(ValueError, match="5 columns, and the weight 16"):
        sparse.linear(torch.zeros(1, 5).half(), sparse.compress(torch.zeros(16, 16).half()))
    with pytest.raises(ValueError, match="e4m3 needs scales"):
        sparse.compress(torch.zeros(16, 16).to(E4M3))
    made = sparse.compress_fp8(OnFp8(torch.zeros(16, 16).to(E4M3), torch.ones(16)))
    with pytest.raises(ValueError, match=r"x is torch.float16 \[1, 16\] for a weight of 16 columns of e4m3"):
        sparse.linear_fp8(torch.zeros(1, 16).half(), torch.ones(1), made, None, "", torch.float16)


def test_why_it_is_not_available_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch sees none" in cslt.unavailable()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in cslt.unavailable()
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: None)
    assert "could not be loaded" in cslt.unavailable()
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 800)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "sm_80" in cslt.unavailable()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert cslt.unavailable() == ""
    assert cslt.unavailable(fp8=True) == ""
    assert "slower" in cslt.doubtful()
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    assert cslt.doubtful() == ""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "sm_89" in cslt.unavailable(fp8=True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 502)
    assert "from version 602 on, and this is 502" in cslt.unavailable(fp8=True)


def test_torch_has_the_operators_by_these_names_and_arguments() -> None:
    ops = cslt_ops()
    x = torch.zeros(16, 16, dtype=torch.float16)
    half = torch.float16
    calls = (
        lambda: ops.compress(x),
        lambda: ops.search(x, x, None, None, half),
        lambda: ops.multiply(x, x, None, None, half, 0),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="CPU"):  # the arguments were taken; the CPU has no kernel
            call()
