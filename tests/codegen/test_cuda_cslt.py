"""Dispatch to cuSPARSELt, with stand-ins for its operators that hold to its rules."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import reference
from sparsec.codegen.cuda import cslt
from sparsec.codegen.cuda.cslt import Cslt
from sparsec.compat import CsltOps, cslt_ops


class StandIn:
    """The operators on dense tensors; refuses shapes as torch does."""

    def __init__(self) -> None:
        self.searched: list[tuple[int, ...]] = []
        self.algorithms: list[int] = []

    def compress(self, weight: torch.Tensor) -> torch.Tensor:
        assert all(size % 16 == 0 for size in weight.shape)
        assert not bool((torch.signbit(weight) & (weight == 0)).any())
        return weight.clone()

    def search(self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None) -> int:
        self.searched.append(tuple(x.shape))
        return 7

    def multiply(
        self, weight: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None, algorithm: int
    ) -> torch.Tensor:
        assert x.shape[0] % 16 == 0
        assert x.shape[1] % 8 == 0
        assert bias is None or len(bias) == len(weight)
        self.algorithms.append(algorithm)
        y = weight.float() @ x.float()
        return (y if bias is None else y + bias.float()[:, None]).to(x.dtype).t().contiguous()


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


def test_the_search_runs_once_for_a_shape() -> None:
    sparse, stand_in = dispatch()
    weight = sparse.compress(torch.zeros(32, 64, dtype=torch.bfloat16))
    for rows in (5, 8, 1, 9):  # three are eight after padding
        sparse.linear(torch.zeros(rows, 64, dtype=torch.bfloat16), weight)
    assert stand_in.searched == [(64, 8), (64, 16)]
    assert stand_in.algorithms == [7] * 4


def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    sparse, _ = dispatch()
    with pytest.raises(ValueError, match="bf16 and fp16, not float32"):
        sparse.compress(torch.zeros(16, 16))
    with pytest.raises(ValueError, match="takes a matrix"):
        sparse.compress(torch.zeros(16))
    with pytest.raises(ValueError, match="5 columns, and the weight 16"):
        sparse.linear(torch.zeros(1, 5).half(), sparse.compress(torch.zeros(16, 16).half()))


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
    assert "slower" in cslt.doubtful()
    monkeypatch.setattr(torch.backends.cusparselt, "version", lambda: 801)
    assert cslt.doubtful() == ""


def test_torch_has_the_operators_by_these_names_and_arguments() -> None:
    ops = cslt_ops()
    x = torch.zeros(16, 16, dtype=torch.float16)
    for call in (lambda: ops.compress(x), lambda: ops.search(x, x, None), lambda: ops.multiply(x, x, None, 0)):
        with pytest.raises(NotImplementedError, match="CPU"):  # the arguments were taken; the CPU has no kernel
            call()
