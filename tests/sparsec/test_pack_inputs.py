"""Layers that round their inputs to int8, packed: the same answers, integer kernels where chosen, and kept by files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparsec
from sparsec.errors import BadPack, BadPackedFile, BuildError, SparsecWarning
from sparsec.pack import pack_, packed_layers, unpack_
from sparsec.packed import PackedLinear, checked
from sparsec.packed_file import load_packed, report_of
from sparsec.passes.quantize.contract import Grid
from sparsec.passes.quantize.inputs import QuantizedInputLinear, inputs_of, set_inputs
from sparsec.runtime import packed as runtime
from sparsec.runtime.packed import Meta
from sparsec.runtime.store import STORE
from sparsec.targets import reference
from sparsec.targets.base import KernelRate, Rates

OPTIONS = {"min_speedup": 0, "formats": ["bitmap+int8"]}
INPUTS = ["int8", "int8:0.03125"]
SHAPES = [(1, 96), (3, 96), (40, 96), (2, 5, 96), (96,), (0, 96)]
RateCodes = Callable[[float], None]


@pytest.fixture
def rate_codes(monkeypatch: pytest.MonkeyPatch) -> RateCodes:
    """Gives the made-up machine kernels for bitmap+int8; those that round x take ``seconds`` a position and row."""
    plain = reference.rates

    def rate(seconds: float) -> None:
        def one(loop: str, each: float) -> KernelRate:
            points = tuple((m, 0.0, m * each, 0.0) for m in (1, 2))
            return KernelRate("bitmap", loop, "fp32", points, stored=(0.125, 1.0), values="int8")

        found = [one("dot", 3e-11), one("outer", 3e-11), one("dot/int8", seconds)]
        coded = tuple(replace(k, dtype=dtype) for k in found for dtype in ("fp32", "bf16"))

        def rates(threads: int) -> Rates:
            made = plain(threads)
            return replace(made, kernels=(*made.kernels, *coded))

        monkeypatch.setattr(reference, "rates", rates)

    return rate


def quantised(inputs: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 160), nn.ReLU(), nn.Linear(160, 48, bias=False)).to(dtype).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            masked = layer.weight.float() * (torch.rand(layer.weight.shape) < 0.5)
            layer.weight.copy_(Grid(8).nearest(masked))
            set_inputs(layer, inputs)
    return model


def packed(
    rate_codes: RateCodes, inputs: str = "int8", dtype: torch.dtype = torch.float32, integer: bool = True
) -> tuple[nn.Sequential, nn.Sequential]:
    """(dense, packed); ``integer``: by kernels that round x themselves, else by others of the same format."""
    rate_codes(1e-12 if integer else 1.0)
    dense = quantised(inputs, dtype)
    model = copy.deepcopy(dense)
    report = pack_(model, "reference", options=OPTIONS)
    assert [row.format for row in report.rows] == ["bitmap+int8"] * 2
    assert [row.plan.x if row.plan else None for row in report.rows] == ["int8" if integer else ""] * 2
    return dense, model


def run_by(layer: Any, *routes: tuple[int, str]) -> None:
    layer._pack[0].data = replace(Meta.decode(layer._pack[0]), routes=routes).encode()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.allclose(a.float(), b.float(), atol=1e-5 if b.dtype == torch.float32 else 3e-2, rtol=1e-4)


@pytest.mark.parametrize("integer", [True, False])
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_packed_layer_rounds_its_inputs_as_the_layer_did(
    dtype: torch.dtype, inputs: str, integer: bool, rate_codes: RateCodes
) -> None:
    dense, model = packed(rate_codes, inputs, dtype, integer)
    plain = unpack_(copy.deepcopy(model))
    set_inputs(plain[0], "")
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        assert close(model[0](x), dense[0](x)), shape
    if dtype == torch.float32:  # rounding is no rounding error
        x = torch.randn(8, 96)
        assert not close(model[0](x), plain[0](x))
    assert Meta.decode(model[0]._pack[0]).reads == ("int8" if integer else "")


@pytest.mark.parametrize("inputs", INPUTS)
@torch.no_grad()
def test_every_loop_of_a_pack_reads_rounded_rows(inputs: str, rate_codes: RateCodes) -> None:
    for integer, loops in ((True, ("dot/int8", "unpack/int8")), (False, ("dot", "outer", "unpack"))):
        dense, model = packed(rate_codes, inputs, integer=integer)
        for loop in loops:
            run_by(model[0], (0, loop))
            for rows in (1, 7, 70):
                x = torch.randn(rows, 96)
                assert close(model[0](x), dense[0](x)), loop


@pytest.mark.parametrize("inputs", INPUTS)
@torch.no_grad()
def test_a_packed_model_compiles_and_is_verified(
    inputs: str, rate_codes: RateCodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSEC_VERIFY", "1")
    dense, model = packed(rate_codes, inputs)
    for layer in packed_layers(model).values():  # a meta that this process has not met: it is looked at when verifying
        run_by(layer, (0, "dot/int8"), (99, "unpack/int8"))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="sparsec", fullgraph=True, options={"target": "reference"})
    before = STORE.verified
    for rows in (1, 2, 7, 64):
        x = torch.randn(rows, 96)
        assert close(compiled(x), dense(x))
    assert STORE.verified == before + 8


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("integer", [True, False])
def test_unpacking_gives_the_layer_back(inputs: str, integer: bool, rate_codes: RateCodes) -> None:
    dense, model = packed(rate_codes, inputs, integer=integer)
    assert f"x={inputs}" in repr(model[0])
    unpack_(model)
    assert type(model[0]) is QuantizedInputLinear
    assert [inputs_of(layer) for layer in (model[0], model[2])] == [inputs, inputs]
    before, after = dense.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_layers_of_transformers_that_round_are_packed() -> None:
    from transformers.pytorch_utils import Conv1D

    from sparsec.passes.quantize.inputs_conv1d import QuantizedInputConv1D

    torch.manual_seed(0)
    layer: Any = Conv1D(48, 64)
    with torch.no_grad():
        layer.weight.masked_fill_(torch.rand(64, 48) < 0.8, 0)
    set_inputs(layer, "int8")
    model = nn.Sequential(layer)
    dense = copy.deepcopy(model)
    assert pack_(model, "reference", options={"min_speedup": 0}).packed
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert close(model(x), dense(x))
    assert type(unpack_(model)[0]) is QuantizedInputConv1D
    assert torch.equal(model[0].weight, layer.weight)


def test_layers_that_share_a_weight_and_round_differently_stay_dense() -> None:
    model = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
    with torch.no_grad():
        model[0].weight.masked_fill_(torch.rand(64, 64) < 0.8, 0)
    model[1].weight = model[0].weight
    set_inputs(model[0], "int8")
    report = pack_(model, "reference", options={"min_speedup": 0})
    assert "round their inputs differently" in report.rows[0].reason
    set_inputs(model[1], "int8")
    assert pack_(model, "reference", options={"min_speedup": 0}).rows[0].tied == ("1",)


@torch.no_grad()
def test_without_a_compiler_python_rounds(rate_codes: RateCodes, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, model = packed(rate_codes, "int8:0.03125")

    def fails(*args: Any) -> Any:
        raise BuildError(detail="no compiler here")

    monkeypatch.setattr(runtime.build, "build", fails)
    run_by(model[0], (0, "dot/int8"), (98, "unpack/int8"))
    x = torch.randn(3, 96)
    with pytest.warns(SparsecWarning, match="no compiler here"):
        assert close(model[0](x), dense[0](x))
    assert torch.equal(model[0].weight, dense[0].weight)


@pytest.mark.parametrize("x", ["int8:nan", "int8:-1.0", "int8:given", "int4", "int8:min=-1", ""])
def test_a_meta_that_rounds_as_no_layer_does_is_refused(x: str, rate_codes: RateCodes) -> None:
    _, model = packed(rate_codes)
    pack = list(model[0]._pack)
    pack[0] = replace(Meta.decode(pack[0]), x=x).encode()
    with pytest.raises(BadPack, match="its meta cannot be read"):
        checked(pack)


# -------------------------------------------------------------------------------------------------------- in files


class Net(nn.Module):
    """``up`` and ``down`` are packed; ``head`` is full, so it stays dense, and rounds its inputs all the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down, self.head = nn.Linear(96, 64), nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.down(self.up(x)))
        return y


def net(inputs: str) -> Net:
    model = Net().eval()
    with torch.no_grad():
        for layer in (model.up, model.down):
            layer.weight.copy_(Grid(8).nearest(layer.weight * (torch.rand(layer.weight.shape) < 0.4)))
    for layer in (model.up, model.head):
        set_inputs(layer, inputs)
    return model


@pytest.fixture(params=INPUTS)
def saved(request: pytest.FixtureRequest, rate_codes: RateCodes, tmp_path: Path) -> tuple[Path, Net]:
    """(file, the dense model)."""
    rate_codes(1e-12)
    dense = net(request.param)
    model = copy.deepcopy(dense)
    pack_(model, "reference", options=OPTIONS)
    assert list(packed_layers(model)) == ["up", "down"]
    return sparsec.save(model, tmp_path / "model.safetensors"), dense


@torch.no_grad()
def test_a_file_keeps_the_rounding_of_packed_and_of_dense_layers(saved: tuple[Path, Net]) -> None:
    file, dense = saved
    x = torch.randn(5, 96)
    with torch.device("meta"):
        empty = Net().eval()
    rounds_elsewhere = net("int8:0.5")
    set_inputs(rounds_elsewhere.down, "int8")
    for model in (Net().eval(), empty, rounds_elsewhere):
        sparsec.load(file, model)
        assert isinstance(model.up, PackedLinear)
        assert model.up.inputs == inputs_of(dense.up)
        assert isinstance(model.down, PackedLinear)
        assert model.down.inputs == ""
        assert inputs_of(model.head) == inputs_of(dense.head)
        assert close(model(x), dense(x))
        assert close(unpack_(model)(x), dense(x))
    assert "bitmap+int8/int8" in str(report_of(file))


def test_a_file_that_does_not_fit_leaves_the_rounding_as_it_was(saved: tuple[Path, Net]) -> None:
    model = net("int8:0.5")
    model.down = nn.Linear(64, 32)
    with pytest.raises(BadPackedFile, match="down is a packed linear"):
        load_packed(saved[0], model)
    assert [inputs_of(m) for m in (model.up, model.head)] == ["int8:0.5", "int8:0.5"]
