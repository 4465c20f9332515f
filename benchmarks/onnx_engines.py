"""ONNX Runtime and OpenVINO on the dense file: plain MatMul nodes, one for each layer of a case."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case
from benchmarks.engines import Built, Declines, difference, encoder, inputs, reference, weights

NO_BF16 = "ONNX Runtime's CPU MatMul takes no bf16"


def write_layers(case: Case, path: Path) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """Write y_i = x_i @ W_i as ONNX; returns the inputs by name and the expected first and last answers."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors, xs = weights(case), inputs(case)
    wanted = reference(case, tensors, xs)
    kept = [numpy_helper.from_array(np.ascontiguousarray(t.t().numpy()), f"w{i}") for i, t in enumerate(tensors)]
    nodes, ins, outs = [], [], []
    for i in range(case.calls):
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i % len(tensors)}"], [f"y{i}"]))
        ins.append(helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, [case.m, case.k]))
        outs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [case.m, case.n]))
    graph = helper.make_graph(nodes, "layers", ins, outs, kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path), save_as_external_data=True, location=path.name + ".data")
    return {f"x{i}": x.numpy() for i, x in enumerate(xs)}, wanted


def write_encoder(case: Case, path: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Export MiniLM; returns its inputs by name and the hidden states that torch gives."""
    model, kwargs = encoder(case)
    wanted = model(**kwargs).last_hidden_state
    names = list(kwargs)
    torch.onnx.export(
        model, (), str(path), kwargs=kwargs, input_names=names, output_names=["hidden", "pooled"], dynamo=True
    )
    return {name: value.numpy() for name, value in kwargs.items()}, wanted


def build_onnxruntime(case: Case) -> Built:
    if case.dtype != "fp32":
        raise Declines(NO_BF16)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        feed, wanted = (write_encoder if case.kind == "encoder" else write_layers)(case, path)
        call = on_onnxruntime(path, case, feed)
    return Built(call, "ONNX Runtime", error_of(call(), wanted))


def on_onnxruntime(path: Path, case: Case, feed: dict[str, Any]) -> Callable[[], Any]:
    """A session of the file that runs with the threads of the case."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # idle between rounds, fast inside one
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {i.name: feed[i.name] for i in session.get_inputs()}

    def call() -> Any:
        return session.run(None, feed)

    return call


def build_openvino(case: Case) -> Built:
    needs_openvino()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write = write_encoder if case.kind == "encoder" else write_layers
        feed, wanted = write(case_in_fp32(case), path)
        call, inside = on_openvino(path, case, feed)
    return Built(call, f"OpenVINO, {inside} inside", error_of(call(), wanted))


def needs_openvino() -> None:
    """Raises Declines where it is not installed."""
    try:
        import openvino  # noqa: F401
    except ImportError:
        raise Declines("not installed; run: pip install 'sparsec[openvino]'") from None


def on_openvino(path: Path, case: Case, feed: dict[str, Any]) -> tuple[Callable[[], Any], str]:
    """A request for the file, and the precision it calculates in: it may not follow the hint on every CPU."""
    import openvino

    core = openvino.Core()
    hints = {"INFERENCE_PRECISION_HINT": {"fp32": "f32", "bf16": "bf16"}[case.dtype]}
    compiled = core.compile_model(str(path), "CPU", {**hints, "INFERENCE_NUM_THREADS": case.threads})
    request = compiled.create_infer_request()
    for name, value in feed.items():
        request.set_tensor(name, openvino.Tensor(value))

    def call() -> Any:
        request.infer()
        return [request.get_output_tensor(i).data for i in range(len(compiled.outputs))]

    return call, compiled.get_property("INFERENCE_PRECISION_HINT").to_string()


def case_in_fp32(case: Case) -> Case:
    """OpenVINO reads an fp32 file and converts to bf16 by itself."""
    from dataclasses import replace

    return replace(case, dtype="fp32")


def error_of(found: list[Any], wanted: Any) -> float:
    if isinstance(wanted, list):
        return difference(found, wanted)
    return float((torch.as_tensor(found[0]) - wanted).abs().max() / wanted.abs().max())
