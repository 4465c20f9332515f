"""torch.compile(backend="sparsec") on weights that lie on grids: codes are found, decided, packed and proven."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sparsec
from sparsec.formats import Format
from sparsec.passes.quantize.contract import Grid
from sparsec.passes.quantize.inputs import set_inputs
from sparsec.runtime.store import STORE

N, K = 64, 256


def quantised(dtype: torch.dtype, bits: int, group: int, zeros: float) -> nn.Sequential:
    torch.manual_seed(0)
    layer = nn.Linear(K, N).to(dtype)
    with torch.no_grad():
        masked = layer.weight.float() * (torch.rand(N, K) >= zeros)
        layer.weight.copy_(Grid(bits, group).nearest(masked))
    return nn.Sequential(layer).eval()


def formats_that_ran(model: nn.Module) -> set[str]:
    return {str(pack.format) for (impl, _), held in STORE._held.items() for pack in held.packs
            if impl in {p._cdata for p in model.parameters()}}  # fmt: skip


@pytest.fixture(autouse=True)
def _clean() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("inputs", ["none", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group", "format"), [(8, 0, "bitmap+int8"), (4, 32, "bitmap+int4g32")])
def test_codes_are_found_and_give_the_answers_of_the_floats(
    bits: int, group: int, format: str, dtype: torch.dtype, inputs: str
) -> None:
    model = quantised(dtype, bits, group, 0.5)
    set_inputs(model[0], "" if inputs == "none" else inputs)
    options = {"formats": [format], "min_speedup": 0, "verify": True}
    fast = torch.compile(model, backend="sparsec", options=options)
    with torch.inference_mode():
        for rows in (1, 5, 40):
            x = torch.randn(rows, K).to(dtype)
            torch.testing.assert_close(fast(x), model(x), atol=1e-4 if dtype == torch.float32 else 3e-2, rtol=2e-2)
    assert formats_that_ran(model) == {format}


def test_a_weight_that_leaves_its_grid_stays_right() -> None:
    model = quantised(torch.float32, 8, 0, 0.5)
    options = {"formats": ["bitmap"], "min_speedup": 0}
    fast = torch.compile(model, backend="sparsec", options=options)
    x = torch.randn(2, K)
    with torch.no_grad():
        fast(x)
        model[0].weight.mul_(1 + 0.1 * torch.rand(N, K))
        torch.testing.assert_close(fast(x), model(x), atol=1e-4, rtol=1e-4)
    assert all(Format.parse(name).values == "fp32" for name in formats_that_ran(model))


def test_explain_names_the_codes() -> None:
    model = quantised(torch.float32, 8, 0, 0.5)
    options = {"formats": ["bitmap+int8"], "min_speedup": 0}
    report = sparsec.explain(model, torch.randn(1, K), options=options)
    assert report.layers[0].decision == "bitmap+int8"
    assert "weights on int8 grid, per row" in str(report)
