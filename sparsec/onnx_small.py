"""Small files in standard ONNX: constants with many zeros in, what a runtime expands when it loads the file out.

``bitmap``: kept values and the gaps between them, a byte each, which standard operators scatter; runtimes fold them to
the dense constant. ``sparse_initializer``: ONNX's own, with 8 bytes for each position. Neither makes a call faster, and
both make loading slower; embeddings and convolutions become small too, which no operator of ours reads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from sparsec.codegen.onnx.bodies import MOST, steps
from sparsec.onnx_sites import constant, initializer, named

if TYPE_CHECKING:
    import onnx_ir as ir

WAYS = ("bitmap", "sparse_initializer")
LEAST = 1 << 14  # elements of a constant that is worth it


def expand_when_loaded(model: ir.Model) -> int:
    """Store constants of floats as kept values and gaps, where that is smaller; how many."""
    import onnx_ir as ir

    done = 0
    for value in list(model.graph.initializers.values()):
        array = _floats(value)
        if array is None:
            continue
        at = np.flatnonzero(array)
        gaps = steps(at)
        if (gaps.itemsize + 4) * at.size >= array.nbytes:
            continue
        done += 1
        name, shape = str(value.name), np.array(array.shape, np.int64)
        held = {
            "gaps": gaps, "kept": array.reshape(-1)[at], "size": np.array([array.size]), "shape": shape,
            "axis": np.array(0),
        }  # fmt: skip
        of = {part: initializer(model.graph, f"{name}.{part}", what) for part, what in held.items()}
        zero = ir.tensor(np.zeros(1, np.float32))
        nodes = [
            ir.node("ConstantOfShape", [of["size"]], {"value": zero}),
            ir.node("Cast", [of["gaps"]], {"to": ir.DataType.INT32 if array.size <= MOST else ir.DataType.INT64}),
        ]
        nodes.append(ir.node("CumSum", [nodes[1].outputs[0], of["axis"]]))
        nodes.append(ir.node("ScatterElements", [nodes[0].outputs[0], nodes[2].outputs[0], of["kept"]]))
        nodes.append(ir.node("Reshape", [nodes[3].outputs[0], of["shape"]]))
        for i, node in enumerate(nodes):
            node.name = f"{name}_expand_{i}"
        named(model.graph, nodes)
        whole = nodes[-1].outputs[0]
        whole.type, whole.shape = value.type, value.shape
        ir.convenience.replace_all_uses_with(value, whole)
        del model.graph.initializers[name]
        model.graph.insert_before(model.graph[0], nodes)
    return done


def as_sparse_initializers(model: Any) -> int:
    """The same in a ModelProto with ``sparse_initializer``; how many."""
    from onnx import helper, numpy_helper

    kept, done = [], 0
    asked = {value.name for value in (*model.graph.input, *model.graph.output)}
    for tensor in model.graph.initializer:
        dense = tensor.data_type == 1 and len(tensor.dims) > 1 and tensor.name not in asked
        array = numpy_helper.to_array(tensor) if dense else None
        at = np.flatnonzero(array) if array is not None and array.size >= LEAST else None
        if array is None or at is None or 12 * at.size >= array.nbytes:
            kept.append(tensor)
            continue
        done += 1
        values = numpy_helper.from_array(array.reshape(-1)[at], tensor.name)
        indices = numpy_helper.from_array(at.astype(np.int64), f"{tensor.name}.positions")
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return done


def _floats(value: ir.Value) -> np.ndarray[Any, Any] | None:
    tensor = constant(value)
    if tensor is None or str(tensor.dtype) != "FLOAT" or len(tensor.shape) < 2 or tensor.size < LEAST:
        return None
    return None if value.is_graph_output() else tensor.numpy()
