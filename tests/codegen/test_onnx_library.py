"""The library of operators for ONNX Runtime: it computes the reference, refuses what is no pack, and never crashes."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from sparsec.codegen import cpp, reference
from sparsec.codegen.onnx import bodies
from sparsec.codegen.onnx.ops import DOMAIN, LAYOUT, STANDARD, Op, compile_library
from sparsec.onnx_rewrite import _kept

BITMAP, INTEGER, FIXED, *DENSE, INDEX = STANDARD
X_SCALE = 1 / 64  # of operators that round all of x with one; clips what is beyond 2


@pytest.fixture(scope="module")
def library(kernel_cache: Path) -> Path:
    return compile_library(STANDARD, kernel_cache)


def a_weight(op: Op, n: int, k: int, density: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    if op.x:
        weight = (torch.rand(n, k, generator=generator) * 254 - 127).round() / 128
        weight[:, 0] = 127 / 128
    kept = torch.rand(n, k, generator=generator) < density
    kept[:, 0] |= bool(op.x)
    return weight * kept


def tensors_of(op: Op, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, np.ndarray[Any, Any]]:
    packed = cpp.pack_verified(weight, op.format, "test", x=op.x)
    tensors = (*packed.tensors, bodies.gaps(packed.tensors[0])) if "gaps" in op.packs else packed.tensors
    found = {"bias": bias, "work": packed.work, **dict(zip(op.packs, tensors, strict=True))}
    arrays = {name: tensor.contiguous().numpy().reshape(-1) for name, tensor in found.items()}
    return {name: array.view(np.uint8) if name == "masks" else array for name, array in arrays.items()}


def a_model(op: Op, shape: tuple[int, int], tensors: dict[str, np.ndarray[Any, Any]], **said: Any) -> onnx.ModelProto:
    n, k = shape
    attributes = {
        "n": n,
        "k": k,
        "outer_from": 8,
        "version": LAYOUT,
        **({"x_scale": X_SCALE} if op.fixed else {}),
        **said,
    }
    node = helper.make_node(op.name, ["x", *tensors], ["y"], domain=DOMAIN, **attributes)
    graph = helper.make_graph(
        [node],
        "one layer",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    opsets = [helper.make_opsetid("", bodies.OPSET), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=[bodies.function(op)])


def a_session(model: onnx.ModelProto, library: Path | None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def wanted(op: Op, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (reference.quantised(x, X_SCALE if op.fixed else 0.0) if op.x else x) @ weight.t() + bias


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
@pytest.mark.parametrize("ours", [True, False], ids=["library", "plain"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.integers(1, 70), k=st.integers(1, 300), m=st.integers(1, 20),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]), seed=st.integers(0, 99),
)  # fmt: skip
def test_an_operator_computes_the_reference_with_the_library_and_without(
    library: Path, op: Op, ours: bool, n: int, k: int, m: int, density: float, seed: int
) -> None:
    weight, bias = a_weight(op, n, k, density, seed), torch.randn(n)
    model = a_model(op, (n, k), tensors_of(op, weight, bias))
    x = torch.randn(m, k)
    (y,) = a_session(model, library if ours else None).run(None, {"x": x.numpy()})
    want = wanted(op, x, weight, bias)
    torch.testing.assert_close(torch.from_numpy(y), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("ours", [True, False], ids=["library", "plain"])
@pytest.mark.parametrize("op", [INTEGER, FIXED, *DENSE], ids=lambda op: op.name)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_cannot_be_rounded_gives_nan(library: Path, op: Op, ours: bool, value: float) -> None:
    weight, bias, x = a_weight(op, 32, 64, 0.5), torch.randn(32), torch.randn(3, 64)
    x[1, 5] = value
    (y,) = a_session(a_model(op, (32, 64), tensors_of(op, weight, bias)), library if ours else None).run(
        None, {"x": x.numpy()}
    )
    if op.fixed and np.isinf(value):  # one scale for all clips it
        want = wanted(op, x, weight, bias)
        torch.testing.assert_close(torch.from_numpy(y), want, rtol=1e-4, atol=1e-4)
        return
    assert np.isfinite(y).all(1).tolist() == [True, False, True]
    assert np.isnan(y[1]).all()


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 3e38])
def test_a_scale_that_rounds_nothing_is_refused(library: Path, scale: float) -> None:
    tensors = tensors_of(FIXED, a_weight(FIXED, 32, 64, 0.5), torch.randn(32))
    with pytest.raises(Exception, match="x_scale is out of range"):
        a_session(a_model(FIXED, (32, 64), tensors, x_scale=scale), library)
    model = a_model(FIXED, (32, 64), tensors)
    del model.functions[:]
    model.graph.node[0].attribute.remove(next(a for a in model.graph.node[0].attribute if a.name == "x_scale"))
    with pytest.raises(Exception, match="an attribute is missing"):
        a_session(model, library)


def test_an_operator_without_kernel_and_body_is_refused_by_name(library: Path) -> None:
    model = a_model(BITMAP, (32, 64), tensors_of(BITMAP, a_weight(BITMAP, 32, 64, 0.5), torch.randn(32)))
    del model.functions[:]
    with pytest.raises(Exception, match=BITMAP.name):
        a_session(model, None)
    model.graph.node[0].op_type = "Linear_of_tomorrow"
    with pytest.raises(Exception, match="Linear_of_tomorrow"):
        a_session(model, library)


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
@pytest.mark.parametrize("shape", [(2, 3, 64), (64,), (0, 64), (1, 1, 1, 64)], ids=str)
def test_x_may_have_any_number_of_axes(library: Path, op: Op, shape: tuple[int, ...]) -> None:
    weight, bias = a_weight(op, 32, 64, 0.5), torch.randn(32)
    x = torch.randn(shape)
    (y,) = a_session(a_model(op, (32, 64), tensors_of(op, weight, bias)), library).run(None, {"x": x.numpy()})
    assert y.shape == (*shape[:-1], 32)
    torch.testing.assert_close(torch.from_numpy(y), wanted(op, x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_a_pack_tells_how_many_weights_it_keeps(op: Op, density: float) -> None:
    weight = a_weight(op, 33, 70, density)
    assert _kept(tensors_of(op, weight, torch.zeros(33)), 33, 70) == int(weight.count_nonzero())


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
def test_the_model_is_valid_and_its_shapes_can_be_told(op: Op) -> None:
    weight, bias = a_weight(op, 32, 64, 0.5), torch.randn(32)
    model = a_model(op, (32, 64), tensors_of(op, weight, bias))
    for value, width in ((model.graph.input[0], 64), (model.graph.output[0], 32)):
        value.CopyFrom(helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, ["m", width]))
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, strict_mode=True)


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
def test_plain_runtime_folds_the_body_to_one_product(op: Op, tmp_path: Path) -> None:
    """Nothing of the decoding is left for run time."""
    weight, bias = a_weight(op, 64, 128, 0.2), torch.randn(64)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 4
    data = a_model(op, (64, 128), tensors_of(op, weight, bias)).SerializeToString()
    onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    ops = {node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node}
    assert ops & {"Gemm", "MatMul", "MatMulInteger", "MatMulIntegerToFloat"}
    assert not ops & {"Gather", "CumSum", "Where", "Reshape", "Transpose", "Slice", "ScatterElements"} - (
        {"Where"} if op.x else set()
    )


BROKEN = {
    "n of another weight": ({"n": 33}, {}, ""),
    "k of another weight": ({"k": 640}, {}, ""),
    "a negative n": ({"n": -5}, {}, "out of range"),
    "a huge k": ({"k": 2**62}, {}, "out of range"),
    "another version": ({"version": LAYOUT + 1}, {}, "another version"),
    "a start out of range": ({}, {"start": lambda a: a + 10**12}, "start"),
    "starts that fall": ({}, {"start": lambda a: a[::-1].copy()}, "start"),
    "masks of ones": ({}, {"masks": lambda a: np.full_like(a, 255)}, "start"),
    "masks cut off": ({}, {"masks": lambda a: a[:-4]}, "masks"),
    "work that falls": ({}, {"work": lambda a: a[::-1].copy()}, "work"),
    "negative work": ({}, {"work": lambda a: a - 10**9}, "work"),
    "floats as work": ({}, {"work": lambda a: a.astype(np.float32)}, "work"),
    "a short bias": ({}, {"bias": lambda a: a[:3]}, "bias"),
    "a matrix as masks": ({}, {"masks": lambda a: a.reshape(2, -1)}, "dimension"),
}  # fmt: skip


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_pack_is_refused_with_a_sentence(library: Path, op: Op, what: str) -> None:
    said, changes, why = BROKEN[what]
    if "masks" in changes and op is INDEX:
        pytest.skip("has no masks")
    if "masks" in changes and not op.masked:
        changes, why = {"masks": lambda a: np.zeros(8, np.uint8)}, "none are wanted"
    tensors = tensors_of(op, a_weight(op, 32, 64, 0.5), torch.randn(32))
    tensors.update({name: change(tensors[name]) for name, change in changes.items()})
    with pytest.raises(Exception, match=rf"sparsec::{op.name} cannot be loaded: .*{why}"):
        a_session(a_model(op, (32, 64), tensors, **said), library)


BROKEN_SLICES = {
    "lanes of zero": ("lanes", lambda a: np.zeros_like(a), "a step has no lanes"),
    "lanes of 17": ("lanes", lambda a: np.full_like(a, 17), "more than there are"),
    "a lane more": ("lanes", lambda a: np.concatenate([a[1:2] % 16 + 1, a[1:]]), "where the lanes say"),
    "lanes cut off": ("lanes", lambda a: a[:3], "fewer lanes"),
    "floats as lanes": ("lanes", lambda a: a.astype(np.float32), "no bytes"),
    "too many steps": ("heads", lambda a: np.full_like(a, 200), "too many steps"),
    "ranks that repeat": ("heads", lambda a: np.concatenate([a[:1], a[1:] * 0]), "ranks that are none"),
    "heads cut off": ("heads", lambda a: a[:-70], "heads do not fit"),
    "a position outside": ("positions", lambda a: a | 128, "outside of its 128"),
    "positions cut off": ("positions", lambda a: a[:-70], "fewer positions"),
    "one start too few": ("start", lambda a: a[:-1], "starts do not fit"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN_SLICES)
def test_what_are_no_slices_is_refused_with_a_sentence(library: Path, what: str) -> None:
    name, change, why = BROKEN_SLICES[what]
    tensors = tensors_of(INDEX, a_weight(INDEX, 32, 64, 0.5), torch.randn(32))
    with pytest.raises(Exception, match=rf"sparsec::{INDEX.name} cannot be loaded: .*{why}"):
        a_session(a_model(INDEX, (32, 64), {**tensors, name: change(tensors[name])}), library)


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
def test_values_cut_off_are_refused(library: Path, op: Op) -> None:
    tensors = tensors_of(op, a_weight(op, 32, 64, 0.5), torch.randn(32))
    name = op.packs[0] if op.x else "values"
    with pytest.raises(Exception, match="fewer"):
        a_session(a_model(op, (32, 64), {**tensors, name: tensors[name][:-70]}), library)


def test_x_of_another_width_is_refused_at_run_time(library: Path) -> None:
    tensors = tensors_of(BITMAP, a_weight(BITMAP, 32, 64, 0.5), torch.randn(32))
    session = a_session(a_model(BITMAP, (32, 64), tensors), library)
    with pytest.raises(Exception, match=r"x is not float \[..., k\]"):
        session.run(None, {"x": np.zeros((2, 65), np.float32)})


def test_an_input_that_is_no_initializer_is_refused(library: Path) -> None:
    tensors = tensors_of(BITMAP, a_weight(BITMAP, 32, 64, 0.5), torch.randn(32))
    model = a_model(BITMAP, (32, 64), tensors)
    moved = next(t for t in model.graph.initializer if t.name == "values")
    model.graph.initializer.remove(moved)
    model.graph.input.append(helper.make_tensor_value_info("values", onnx.TensorProto.FLOAT, None))
    with pytest.raises(Exception, match="must be initializers"):
        a_session(model, library)


FUZZ = """
import sys, random, pickle, onnxruntime
library, data, seed = sys.argv[1], open(sys.argv[2], "rb").read(), int(sys.argv[3])
random.seed(seed)
options = onnxruntime.SessionOptions(); options.log_severity_level = 4
options.register_custom_ops_library(library)
import numpy as np
for _ in range(150):
    broken = bytearray(data)
    for _ in range(random.choice((1, 3, 30))):
        broken[random.randrange(len(broken))] ^= 1 << random.randrange(8)
    try:
        session = onnxruntime.InferenceSession(bytes(broken), options, providers=["CPUExecutionProvider"])
        session.run(None, {"x": np.ones((3, 64), np.float32)})
    except Exception as error:
        pass
print("alive")
"""


@pytest.mark.parametrize("op", STANDARD, ids=lambda op: op.name)
def test_flipped_bits_never_end_the_process(library: Path, op: Op, tmp_path: Path) -> None:
    tensors = tensors_of(op, a_weight(op, 32, 64, 0.5), torch.randn(32))
    model = a_model(op, (32, 64), tensors)
    del model.functions[:]  # with a body, a broken node would run in standard operators
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    command = [sys.executable, "-c", FUZZ, str(library), str(path), "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.strip().endswith("alive")


def test_an_operator_without_a_kernel_for_a_format_is_not_offered() -> None:
    from sparsec.codegen.onnx.ops import supported
    from sparsec.formats import Format

    assert supported(Format.parse("bitmap+fp32"))
    assert not supported(Format.parse("index+bf16"))
    assert not supported(Format.parse("index+int8"), "int8")
    assert replace(BITMAP) == BITMAP
