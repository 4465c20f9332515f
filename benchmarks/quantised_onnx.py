"""Quantised weights in ONNX Runtime and OpenVINO: layers or a stack, each product in the form that is fast there.

DynamicQuantizeMatMul: x to unsigned bytes, one scale for all tokens; weights must be signed, or it is many times
slower. MatMulNBits: 2, 4 or 8 bits in blocks of 128; accuracy_level 4 rounds x block by block, without it 2 and 8 bits
are slow. OpenVINO gets DequantizeLinear before MatMul, which it keeps packed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cases import Case
from benchmarks.engines import Built, Declines, inputs
from benchmarks.onnx_engines import NO_BF16, error_of, needs_openvino, on_onnxruntime, on_openvino
from benchmarks.quantised_targets import VALUE_BYTES
from benchmarks.quantised_weights import (
    BITS,
    EPSILON,
    Quantised,
    answers,
    several,
    stack_reference,
    stack_weights,
    token,
)

GROUP = 128
OPSET, IR = 21, 10


@dataclass
class Graph:
    """Nodes and tensors of a file that is being written. ``name`` gives fresh names."""

    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    made: int = 0

    def name(self) -> str:
        self.made += 1
        return f"t{self.made}"

    def keep(self, array: Any) -> str:
        from onnx import numpy_helper

        name = self.name()
        self.tensors[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def node(self, op: str, *names: str, domain: str = "", output: str = "", **attributes: Any) -> str:
        from onnx import helper

        output = output or self.name()
        self.nodes.append(helper.make_node(op, list(names), [output], domain=domain, **attributes))
        return output


Emit = Callable[[Graph, str], str]  # adds a product to the graph: the name of x to the name of y
Form = Callable[[Graph, Case, Quantised], Emit]


def int8(graph: Graph, case: Case, weight: Quantised) -> Emit:
    kept = graph.keep(weight.q.t().numpy()), graph.keep(weight.scale[:, 0].numpy())
    return lambda g, x: g.node("DynamicQuantizeMatMul", x, *kept, domain="com.microsoft")


def nbits(graph: Graph, case: Case, weight: Quantised) -> Emit:
    n, k = weight.q.shape
    bits = BITS[case.weights]
    scales = np.repeat(weight.scale.numpy(), k // GROUP // weight.scale.shape[1], axis=1)
    kept = graph.keep(packed(weight.q.numpy(), bits)), graph.keep(scales.reshape(-1))
    sizes: dict[str, Any] = {"K": k, "N": n, "bits": bits, "block_size": GROUP, "accuracy_level": 4}
    return lambda g, x: g.node("MatMulNBits", x, *kept, domain="com.microsoft", **sizes)


def packed(q: np.ndarray, bits: int) -> np.ndarray:
    """q + 2^(bits - 1) in ``bits`` each, the first in the lowest: uint8 [n, k / GROUP, GROUP * bits / 8]."""
    per = 8 // bits
    unsigned = (q.astype(np.int16) + (1 << bits - 1)).astype(np.uint8).reshape(-1, per)
    found = np.zeros(len(unsigned), np.uint8)
    for i in range(per):
        found |= unsigned[:, i] << (bits * i)
    return found.reshape(q.shape[0], q.shape[1] // GROUP, GROUP * bits // 8)


def dequantised(graph: Graph, case: Case, weight: Quantised) -> Emit:
    """DequantizeLinear of q [n, k], transposed, MatMul."""
    if case.weights == "int4g128":
        q, scale = graph.name(), graph.keep(weight.scale.numpy())
        graph.tensors[q] = int4(weight.q.numpy(), q)
        how: dict[str, Any] = {"axis": 1, "block_size": GROUP}
    else:
        q, scale, how = graph.keep(weight.q.numpy()), graph.keep(weight.scale[:, 0].numpy()), {"axis": 0}

    def emit(g: Graph, x: str) -> str:
        wide = g.node("DequantizeLinear", q, scale, **how)
        return g.node("MatMul", x, g.node("Transpose", wide, perm=[1, 0]))

    return emit


def int4(q: np.ndarray, name: str) -> Any:
    """A tensor of two signed values a byte, the first in the lower half."""
    from onnx import TensorProto

    pairs = (q & 15).astype(np.uint8).reshape(-1, 2)
    raw = (pairs[:, 0] | pairs[:, 1] << 4).tobytes()
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=q.shape, raw_data=raw)


def write(case: Case, form: Form, width: float, path: Path) -> tuple[dict[str, Any], Any]:
    """The file of a case; returns inputs by name and what floats give."""
    graph = Graph()
    if case.kind == "stack":
        x = token(case)
        write_stack(graph, case, form)
        save(graph, path, {"x": (case.k,)}, {"y": (case.k,)}, case.m)
        return {"x": x.numpy()}, stack_reference(case)
    kept, xs = several(case, case.n * case.k * width), inputs(case)
    emits = [form(graph, case, weight) for weight in kept]
    for i in range(case.calls):
        graph.node("Identity", emits[i % len(emits)](graph, f"x{i}"), output=f"y{i}")
    ins = {f"x{i}": (case.k,) for i in range(case.calls)}
    save(graph, path, ins, {f"y{i}": (case.n,) for i in range(case.calls)}, case.m)
    return {f"x{i}": x.numpy() for i, x in enumerate(xs)}, answers(case, kept, xs)


def save(graph: Graph, path: Path, ins: dict[str, Any], outs: dict[str, Any], rows: int) -> None:
    import onnx
    from onnx import TensorProto, helper

    def infos(shapes: dict[str, Any]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, *shape]) for name, shape in shapes.items()
        ]

    made = helper.make_graph(graph.nodes, "layers", infos(ins), infos(outs), list(graph.tensors.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=IR)
    onnx.save(model, str(path), save_as_external_data=True, location=path.name + ".data")


def write_stack(graph: Graph, case: Case, form: Form) -> None:
    """The same nodes as ``quantised_weights.through``, block by block."""
    epsilon = graph.keep(np.float32(EPSILON))
    x = "x"
    for block in stack_weights(case):
        f = {name: form(graph, case, weight) for name, weight in block.items()}
        n = normalised(graph, x, epsilon)
        a = graph.node("Add", graph.node("Add", f["q"](graph, n), f["k"](graph, n)), f["v"](graph, n))
        x = graph.node("Add", x, f["o"](graph, a))
        n = normalised(graph, x, epsilon)
        gate = f["gate"](graph, n)
        silu = graph.node("Mul", gate, graph.node("Sigmoid", gate))
        x = graph.node("Add", x, f["down"](graph, graph.node("Mul", silu, f["up"](graph, n))))
    graph.node("Identity", x, output="y")


def normalised(graph: Graph, x: str, epsilon: str) -> str:
    mean = graph.node("ReduceMean", graph.node("Mul", x, x), graph.keep(np.array([-1])), keepdims=1)
    return graph.node("Div", x, graph.node("Sqrt", graph.node("Add", mean, epsilon)))


def build_int8(case: Case) -> Built:
    if not case.x8:
        raise Declines("DynamicQuantizeMatMul rounds x, which this case reads as it is")
    if case.weights == "int4g128":
        raise Declines("DynamicQuantizeMatMul has no groups")
    return _built(case, int8, VALUE_BYTES["int8"], "DynamicQuantizeMatMul, s8 weights")


def build_nbits(case: Case) -> Built:
    if case.k % GROUP or (case.n % GROUP and case.kind == "stack"):
        raise Declines(f"its blocks are {GROUP} columns, and {case.k} or {case.n} is no multiple of that")
    bits = BITS[case.weights]
    return _built(case, nbits, bits / 8, f"MatMulNBits, {bits} bits, accuracy_level 4")


def _built(case: Case, form: Form, width: float, path: str) -> Built:
    if case.dtype != "fp32":
        raise Declines(NO_BF16)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        feed, wanted = write(case, form, width, file)
        call = on_onnxruntime(file, case, feed)
    return Built(call, path, error_of(call(), wanted))


def build_openvino(case: Case) -> Built:
    needs_openvino()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        feed, wanted = write(replace(case, dtype="fp32"), dequantised, VALUE_BYTES[case.weights], file)
        call, inside = on_openvino(file, case, feed)
    return Built(call, f"OpenVINO, packed weights, {inside} inside", error_of(call(), wanted))
