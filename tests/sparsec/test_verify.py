"""What ``verify=True`` compares: the op's answer with the plain-PyTorch meaning of the layer."""

from __future__ import annotations

import pytest
import torch

from sparsec.errors import VerifyError
from sparsec.options import Policy
from sparsec.plan import Plan
from sparsec.runtime.store import STORE

PLAN = Plan("encoder.up", "linear", Policy(verify=True), act="relu").encode()


def layer(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((3, 64), (16, 64)))
    b = torch.randn(16, generator=generator).to(dtype)
    return x, w, b, torch.relu(x @ w.t() + b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_answer_passes_and_is_counted(dtype: torch.dtype) -> None:
    x, w, b, y = layer(dtype)
    before = STORE.verified
    STORE.verify(x, w, b, y, PLAN)
    assert STORE.verified == before + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_value_raises_and_names_the_layer(dtype: torch.dtype) -> None:
    x, w, b, y = layer(dtype)
    y[1, 5] += 1.0
    with pytest.raises(VerifyError, match=r"encoder\.up"):
        STORE.verify(x, w, b, y, PLAN)


def test_a_value_that_is_not_a_number_raises() -> None:
    x, w, b, y = layer(torch.float32)
    y[0, 0] = float("nan")
    with pytest.raises(VerifyError):
        STORE.verify(x, w, b, y, PLAN)


def test_infinite_inputs_are_not_compared() -> None:
    x, w, b, y = layer(torch.float32)
    x[0, 0] = float("inf")
    STORE.verify(x, w, b, y, PLAN)
