"""ONNX files of other tools, as they come: what is rewritten computes what the file did, or is left alone and said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import sparsec
import sparsec.onnx
from sparsec import onnx_rewrite as rewriting
from sparsec.codegen.onnx import bodies
from sparsec.codegen.onnx.ops import STANDARD
from sparsec.errors import BadModelFile, BadOptionValue, VerifyError, WriteFailed
from sparsec.export_onnx import explain_file, export_onnx, rewrite_file

Array = np.ndarray[Any, Any]
SIDE = 64


def a_weight(seed: int = 0, kept: float = 0.2, shape: tuple[int, int] = (SIDE, SIDE)) -> Array:
    r = np.random.default_rng(seed)
    return (r.standard_normal(shape) * (r.random(shape) < kept)).astype(np.float32)


def a_file(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    inputs: tuple[str, ...] = (),
    opset: int = 21,
    ir: int = 10,
    beside: bool = False,
    shape: tuple[int | str, ...] = ("m", SIDE),
    axes: int = 2,
) -> Path:
    """x [m, SIDE] to y; ``inputs``: constants that are inputs of the graph, too."""
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, constants[name].shape) for name in inputs]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape), *given],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [f"axis{i}" for i in range(axes)])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir)
    if beside:
        onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    else:
        onnx.save(model, path)
    return path


def run(path: Path, ours: bool = False, **feed: Array) -> Array:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if ours:
        found = sparsec.onnx.session(path, options)
    else:
        found = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    y: Array = found.run(None, feed)[0]
    return y


def assert_same(source: Path, made: Path, **feed: Array) -> None:
    want = run(source, **feed)
    for ours in (True, False):
        y = run(made, ours, **feed)
        assert y.shape == want.shape
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4 * float(np.abs(want).max()))


def an_x(rows: int = 3) -> Array:
    return np.random.default_rng(7).standard_normal((rows, SIDE)).astype(np.float32)


MATMUL = helper.make_node("MatMul", ["x", "w"], ["y"])


def test_weights_beside_a_file_come_along(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    for name, scale in (("a", 1.0), ("b", 5.0)):
        (tmp_path / name).mkdir()
        a_file(tmp_path / name / "model.onnx", nodes, {"w": a_weight(), "v": scale * a_weight(1, 1.0)}, beside=True)
    x, want = an_x(), run(tmp_path / "a/model.onnx", x=an_x())
    for to in ("b/model.onnx", "other.onnx", "a/model.onnx"):  # the last one is the source itself
        report = rewrite_file(tmp_path / "a/model.onnx", tmp_path / to, min_speedup=0)
        assert [layer.decision for layer in report.layers] == ["bitmap+fp32", "dense"]
        for ours in (True, False):
            np.testing.assert_allclose(run(tmp_path / to, ours, x=x), want, rtol=1e-4, atol=1e-4)
    (tmp_path / "b/model.onnx.data").unlink()
    assert run(tmp_path / "b/model.onnx", x=x).shape == want.shape


def test_a_file_whose_weights_are_missing_or_cut_off_is_one_sentence(tmp_path: Path) -> None:
    path = a_file(tmp_path / "model.onnx", [MATMUL], {"w": a_weight()}, beside=True)
    data = tmp_path / "model.onnx.data"
    for content in (data.read_bytes()[:100], b""):
        data.write_bytes(content)
        with pytest.raises(BadModelFile):
            rewrite_file(path, tmp_path / "out.onnx")
    data.unlink()
    with pytest.raises(BadModelFile):
        rewrite_file(path, tmp_path / "out.onnx")
    (tmp_path / "empty.onnx").write_bytes(b"")
    with pytest.raises(BadModelFile, match="no graph"):
        explain_file(tmp_path / "empty.onnx")


@pytest.mark.parametrize("compress", ["", "bitmap", "sparse_initializer"])
def test_a_weight_that_may_be_given_stays_a_default(tmp_path: Path, compress: str) -> None:
    big = (SIDE, 512)  # large enough to be packed
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight(shape=big)}, inputs=("w",))
    made = tmp_path / "b.onnx"
    rewrite_file(source, made, min_speedup=0, compress=compress)
    assert_same(source, made, x=an_x())
    assert_same(source, made, x=an_x(), w=a_weight(3, shape=big))


def test_a_bias_that_may_be_given_stays_an_input(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    bias = np.ones(SIDE, np.float32)
    source = a_file(tmp_path / "a.onnx", nodes, {"w": a_weight(), "b": bias}, inputs=("b",))
    rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    assert_same(source, tmp_path / "b.onnx", x=an_x(), b=5 * bias)


def test_old_files_whose_constants_are_inputs_are_rewritten(tmp_path: Path) -> None:
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight()}, inputs=("w",), opset=9, ir=3)
    report = rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32"]
    assert_same(source, tmp_path / "b.onnx", x=an_x())
    onnx.checker.check_model(onnx.load(tmp_path / "b.onnx"), full_check=True)


@pytest.mark.parametrize("opset", [9, 11, 13, 17, 18, 20, 21, 22])
@pytest.mark.parametrize("kind", ["sparse", "low bit"])
def test_files_of_any_opset_are_valid_when_rewritten(tmp_path: Path, opset: int, kind: str) -> None:
    weight = a_weight()
    if kind == "low bit":
        wide = np.random.default_rng(0).standard_normal((128, 48)).astype(np.float32)
        groups = wide.reshape(4, 32, 48)
        scale = np.abs(groups).max(1, keepdims=True) / 7
        weight = (np.round(groups / scale) * scale).astype(np.float32).reshape(128, 48)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    shape = ("m", weight.shape[0])
    source = a_file(tmp_path / "a.onnx", nodes, {"w": weight}, opset=opset, ir=7 if opset < 15 else 10, shape=shape)
    rewrite_file(source, tmp_path / "b.onnx", min_speedup=0 if kind == "sparse" else 1.05)
    onnx.checker.check_model(onnx.load(tmp_path / "b.onnx"), full_check=True)
    x = np.random.default_rng(1).standard_normal((3, weight.shape[0])).astype(np.float32)
    want = run(source, x=x)
    for ours in (True, False):
        np.testing.assert_allclose(run(tmp_path / "b.onnx", ours, x=x), want, atol=2e-2 * float(want.max()))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(SIDE, SIDE), nn.Linear(SIDE, SIDE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.inner(torch.relu(self.inner(x))))


@pytest.mark.parametrize("recipe", ["magnitude", "rtn", "int4"])
@pytest.mark.parametrize("opset", [18, 21])
def test_a_module_that_is_called_twice(tmp_path: Path, recipe: str, opset: int) -> None:
    model = Twice()
    model.head.eval()
    said: dict[str, Any] = {
        "magnitude": {"method": "magnitude", "sparsity": 0.8},
        "rtn": {"method": "rtn", "bits": 8, "activations": "int8"},
        "int4": {"method": "rtn", "bits": 4, "group": 32},
    }[recipe]
    sparsec.sparsify(model, said, progress=False)
    model.train()
    model.head.eval()
    export_onnx(model, (torch.randn(2, SIDE),), tmp_path / "a.onnx", min_speedup=0, opset=opset)
    onnx.checker.check_model(onnx.load(tmp_path / "a.onnx"), full_check=True)
    assert (model.training, model.inner.training, model.head.training) == (True, True, False)  # as they were


def test_names_that_are_taken_are_left_to_whoever_has_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["fc.values"], name="fc"),
        helper.make_node("Add", ["fc.values", "sparsec.zeros.64"], ["fc.work"], name="fc_Linear_bitmap_fp32"),
        helper.make_node("MatMul", ["fc.work", "w"], ["val_0"]),
        helper.make_node("MatMul", ["val_0", "w"], ["fc.masks"]),
        helper.make_node("Relu", ["fc.masks"], ["y"]),
    ]
    offset = np.full((1, SIDE), 3.0, np.float32)
    source = a_file(tmp_path / "a.onnx", nodes, {"w": a_weight(), "sparsec.zeros.64": offset})
    report = rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32"] * 3
    assert_same(source, tmp_path / "b.onnx", x=an_x())


@pytest.mark.parametrize("compress", ["", "bitmap"])
def test_what_a_subgraph_reads_and_names_is_left_alone(tmp_path: Path, compress: str) -> None:
    def branch(op: str) -> onnx.GraphProto:
        inner = [helper.make_node(op, ["h", "b"], ["val_0"]), helper.make_node("Abs", ["val_0"], ["out"])]
        return helper.make_graph(inner, op, [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("If", ["yes"], ["z"], then_branch=branch("Add"), else_branch=branch("Sub")),
        helper.make_node("MatMul", ["z", "v"], ["y"]),
    ]
    bias, wide = np.ones(SIDE, np.float32), a_weight(2, 0.1, (SIDE, 512))
    constants = {"w": a_weight(), "b": bias, "yes": np.array(True), "v": wide}
    source = a_file(tmp_path / "a.onnx", nodes, constants)
    rewrite_file(source, tmp_path / "b.onnx", min_speedup=0 if not compress else 1e9, compress=compress)
    assert_same(source, tmp_path / "b.onnx", x=an_x())


def rounding(scale: Array) -> tuple[list[onnx.NodeProto], dict[str, Array]]:
    nodes = [
        helper.make_node("Div", ["x", "s"], ["a"]),
        helper.make_node("Round", ["a"], ["b"]),
        helper.make_node("Clip", ["b", "low", "high"], ["c"]),
        helper.make_node("Mul", ["c", "s"], ["d"]),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    codes = np.random.default_rng(0).integers(-127, 128, (SIDE, SIDE)).astype(np.float32)
    codes[0] = 127
    low, high = np.array(-127, np.float32), np.array(127, np.float32)
    return nodes, {"s": scale, "low": low, "high": high, "w": codes / 127}


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_a_scale_of_any_rank_gives_the_shape_it_did(tmp_path: Path, axes: int) -> None:
    nodes, constants = rounding(np.full((1,) * axes, 0.02, np.float32))
    source = a_file(tmp_path / "a.onnx", nodes, constants, axes=max(axes, 2))
    rewrite_file(source, tmp_path / "b.onnx")
    assert_same(source, tmp_path / "b.onnx", x=an_x())


def test_a_scale_that_may_be_given_is_read(tmp_path: Path) -> None:
    nodes, constants = rounding(np.full(1, 0.02, np.float32))
    source = a_file(tmp_path / "a.onnx", nodes, constants, inputs=("s",))
    rewrite_file(source, tmp_path / "b.onnx")
    assert_same(source, tmp_path / "b.onnx", x=an_x(), s=np.full(1, 0.3, np.float32))


def test_sums_that_32_bits_do_not_hold_stay_in_floats(tmp_path: Path) -> None:
    k = bodies.MOST_K + 1
    assert 127**2 * bodies.MOST_K < 2**31 <= 127**2 * k
    assert not bodies.countable(STANDARD[3], 16, k, 16 * k)
    nodes, constants = rounding(np.array(1 / 127, np.float32))
    constants["w"] = np.ones((k, 2), np.float32)
    source = a_file(tmp_path / "a.onnx", nodes, constants, shape=("m", k))
    for portable in (True, False):
        rewrite_file(source, tmp_path / "b.onnx", portable=portable)
        assert_same(source, tmp_path / "b.onnx", x=np.ones((1, k), np.float32))


def test_what_is_no_file_is_left_as_it_is(tmp_path: Path) -> None:
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight()})
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(WriteFailed, match="no file"):
        rewrite_file(source, tmp_path / "pipe")
    (tmp_path / "real").mkdir()
    (tmp_path / "real/model.onnx").write_bytes(b"old")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real/model.onnx")
    rewrite_file(source, tmp_path / "link.onnx", min_speedup=0)
    assert (tmp_path / "link.onnx").is_symlink()
    assert_same(source, tmp_path / "real/model.onnx", x=an_x())


def test_a_file_that_fails_its_check_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsec.onnx_verify.differences", lambda *_: {"plain": {"y": 1.0}})
    path = tmp_path / "a.onnx"
    path.write_bytes(b"what was there")
    with pytest.raises(VerifyError):
        export_onnx(nn.Linear(8, 8), (torch.randn(2, 8),), path)
    assert path.read_bytes() == b"what was there"
    assert sorted(tmp_path.iterdir()) == [path]


def test_equal_infinities_are_no_difference(tmp_path: Path) -> None:
    class Masked(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).masked_fill(x > 0, -float("inf"))

    report = export_onnx(Masked(8, 8), (torch.randn(4, 8),), tmp_path / "a.onnx")
    assert max(report.errors["plain"].values()) < 1e-4


def test_options_may_be_used_for_many_sessions(tmp_path: Path) -> None:
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight()})
    rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    options = onnxruntime.SessionOptions()
    want = run(source, x=an_x())
    for _ in range(3):
        (y,) = sparsec.onnx.session(tmp_path / "b.onnx", options).run(None, {"x": an_x()})
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    with pytest.raises(BadModelFile) as caught:
        sparsec.onnx.session((tmp_path / "b.onnx").read_bytes()[:-100], options)
    assert len(str(caught.value)) < 500


def test_options_that_cannot_be_met_are_one_sentence(tmp_path: Path) -> None:
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight()})
    with pytest.raises(BadOptionValue, match="compress"):
        rewrite_file(source, tmp_path / "b.onnx", compress="sparse_initializer", external=True)
    for least in (float("nan"), -1.0):
        with pytest.raises(BadOptionValue, match="min_speedup"):
            rewrite_file(source, tmp_path / "b.onnx", min_speedup=least)
    with pytest.raises(BadOptionValue, match="opset"):
        export_onnx(nn.Linear(8, 8), (torch.randn(2, 8),), tmp_path / "b.onnx", opset=11)
    with pytest.raises(BadModelFile, match=r"no torch\.nn\.Module"):
        export_onnx(lambda x: x, (torch.randn(2, 8),), tmp_path / "b.onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "b.onnx").exists()


def test_explain_counts_the_zeros_of_every_operator(tmp_path: Path) -> None:
    nodes, constants = rounding(np.array(0.02, np.float32))
    source = a_file(tmp_path / "a.onnx", nodes, constants)
    rewrite_file(source, tmp_path / "b.onnx")
    zeros = float((constants["w"] == 0).mean())
    found = [layer.zeros for layer in explain_file(tmp_path / "b.onnx").layers if layer.decision.startswith("Linear")]
    assert found in ([], [pytest.approx(zeros, abs=1e-6)])


def test_a_layer_that_is_dense_at_these_rows_says_where_it_would_not_be(tmp_path: Path) -> None:
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight(shape=(SIDE, 32))})
    for layer in explain_file(source).layers:
        assert not (layer.decision == "dense" and layer.reason.startswith(("skips", "reads")))


def test_lists_of_inputs_and_compiled_models_have_a_dynamic_batch(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            return self.inner(first + torch.stack(others).sum(0))

    class OfAList(Sum):
        def forward(self, xs: list[torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
            return super().forward(*xs)

    xs = [torch.randn(3, 8) for _ in range(3)]
    for model, args in ((Sum(), xs), (OfAList(), [xs]), (torch.compile(Sum(), backend="eager"), xs)):
        export_onnx(model, args, tmp_path / "a.onnx")
        options = onnxruntime.SessionOptions()
        session = sparsec.onnx.session(tmp_path / "a.onnx", options)
        more = [torch.randn(5, 8) for _ in xs]
        feed = {said.name: x.numpy() for said, x in zip(session.get_inputs(), more, strict=True)}
        want = model(*more) if len(args) > 1 else model(more)
        np.testing.assert_allclose(session.run(None, feed)[0], want.detach().numpy(), rtol=1e-4, atol=1e-4)


def test_weights_in_constant_nodes_are_found(tmp_path: Path) -> None:
    held = helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(a_weight(), "w"))
    source = a_file(tmp_path / "a.onnx", [held, MATMUL], {})
    report = rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    assert [layer.decision for layer in report.layers] == ["bitmap+fp32"]
    assert_same(source, tmp_path / "b.onnx", x=an_x())
    again = rewrite_file(tmp_path / "b.onnx", tmp_path / "c.onnx")
    assert [layer.decision for layer in again.layers] == ["Linear_bitmap_fp32"]
    assert_same(source, tmp_path / "c.onnx", x=an_x())


def test_what_a_runtime_cannot_run_is_one_sentence_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadModelFile, match=r"'a\.onnx' cannot be used as a model: .*"):
        export_onnx(nn.Linear(8, 8).bfloat16(), (torch.randn(2, 8).bfloat16(),), tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("n", "k", "group"), [(64, 64, 64), (32, 128, 128), (48, 96, 32)])
def test_groups_as_long_as_a_row_are_groups(tmp_path: Path, n: int, k: int, group: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n))
    sparsec.sparsify(model, {"method": "rtn", "bits": 4, "group": group}, progress=False)
    report = export_onnx(model, (torch.randn(2, k),), tmp_path / "a.onnx")
    assert [layer.decision[:4] for layer in report.layers] == ["int4"], report
    assert "exact=True" in str(report)


def test_a_rewritten_file_is_compared_with_its_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = a_file(tmp_path / "a.onnx", [MATMUL], {"w": a_weight()})
    report = rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    assert {how: max(of.values()) < 1e-5 for how, of in report.errors.items()} == {"sparsec": True, "plain": True}
    initializers = rewriting._initializers

    def wrong(graph: Any, name: str, op: Any, packed: Any) -> Any:
        packed.tensors[1].mul_(2)  # the values of a bitmap
        return initializers(graph, name, op, packed)

    monkeypatch.setattr(rewriting, "_initializers", wrong)
    with pytest.raises(VerifyError):
        rewrite_file(source, tmp_path / "c.onnx", min_speedup=0)
    assert not (tmp_path / "c.onnx").exists()
    report = rewrite_file(source, tmp_path / "c.onnx", verify=False, min_speedup=0)
    assert report.errors == {}


def test_a_file_whose_inputs_cannot_be_made_up_is_written_all_the_same(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Reshape", ["x", "five"], ["h"]),  # wants another size than the one that is made up
        helper.make_node("MatMul", ["h", "w"], ["y"]),
    ]
    constants = {"w": a_weight(), "five": np.array([5, SIDE])}
    source = a_file(tmp_path / "a.onnx", nodes, constants)
    report = rewrite_file(source, tmp_path / "b.onnx", min_speedup=0)
    assert report.errors == {}
    assert_same(source, tmp_path / "b.onnx", x=an_x(5))
