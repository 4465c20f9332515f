"""Layers that round their inputs to int8: the formula, and that the model stays plain PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparsec.passes.quantize.inputs import inputs_of, quantize_inputs, quantized, refusal, scale_in


def slowly(row: list[float], scale: float | None) -> list[float]:
    """One token, number by number, in fp32 as Python has it: through tensors of one element."""
    one = torch.tensor
    s = one(scale) if scale is not None else one(max(map(abs, row))) / one(127.0)
    if s == 0:
        s = one(1.0)
    steps = [min(max(round(float(one(x) / s)), -127), 127) for x in row]  # Python rounds half to even too
    return [float(one(float(q)) * s) for q in steps]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=5, max_size=5), min_size=1, max_size=4),
    scale=st.sampled_from([None, 0.5, 3.0, 1e-3]),
)
def test_inputs_are_rounded_as_the_formula_says_number_by_number(rows: list[list[float]], scale: float | None) -> None:
    given_scale = None if scale is None else torch.tensor(scale)
    found = quantized(torch.tensor(rows), given_scale)
    assert torch.equal(found, torch.tensor([slowly(row, scale) for row in rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_token_of_zeros_stays_zero_and_the_dtype_is_that_of_x(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 8, dtype=dtype)
    x[0, 1] = 0.0
    found = quantized(x)
    assert (found.dtype, found.shape) == (dtype, x.shape)
    assert not bool(found[0, 1].any())
    assert float((found - x).abs().max()) <= float(x.abs().max()) * (0.5 / 127 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [None, 0.25])
def test_a_layer_with_int8_inputs_survives_copies_pickles_and_state_dicts(scale: float | None) -> None:
    layer = nn.Linear(8, 4)
    weight = layer.weight
    quantize_inputs(layer, scale)
    assert layer.weight is weight
    x = torch.randn(3, 8)
    expected = nn.functional.linear(quantized(x, layer.x_scale), layer.weight, layer.bias)  # type: ignore[arg-type]
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
        assert inputs_of(other) == ("int8" if scale is None else "int8:0.25")
    fresh = nn.Linear(8, 4)
    quantize_inputs(fresh, None if scale is None else 7.0)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    assert set(layer.state_dict()) == {"weight", "bias", *(["x_scale"] if scale else [])}


def test_the_repr_says_how_inputs_are_rounded() -> None:
    layer = nn.Linear(8, 4)
    quantize_inputs(layer)
    assert repr(layer) == "QuantizedInputLinear(in_features=8, out_features=4, bias=True, x=int8, per token)"
    quantize_inputs(layer, 0.5)  # again: the scale changes, nothing else
    assert repr(layer).endswith("bias=True, x=int8, x_scale=0.5)")
    assert scale_in(inputs_of(layer)) == 0.5
    assert scale_in("int8") is None


def test_the_conv1d_of_transformers_rounds_its_inputs_too() -> None:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(6, 8)
    x = torch.randn(2, 3, 8)
    expected = layer(quantized(x))
    quantize_inputs(layer)
    assert torch.equal(layer(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), expected)


def test_layers_that_compute_something_of_their_own_are_refused_and_stay_as_they_are() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    own = nn.Linear(4, 4)
    own.forward = lambda x: x  # type: ignore[method-assign, assignment]
    for module, why in ((Scaled(4, 4), "Scaled"), (nn.Conv2d(4, 4, 1), "Conv2d"), (own, "replaced")):
        assert why in refusal(module)
        before = type(module)
        with pytest.raises(ValueError, match=why):
            quantize_inputs(module)
        assert type(module) is before


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_no_positive_number_is_refused(scale: float) -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="positive"):
        quantize_inputs(layer, scale)
    assert type(layer) is nn.Linear


@pytest.mark.parametrize("scale", [None, 0.05])
def test_dynamo_traces_it_without_a_graph_break(scale: float | None) -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    for layer in (model[0], model[2]):
        quantize_inputs(layer, scale)
    x = torch.randn(5, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
