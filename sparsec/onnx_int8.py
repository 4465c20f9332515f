"""Layers of int8 weights and int8 inputs in standard ONNX: codes and scales in, ``MatMulInteger`` out.

ONNX Runtime is fast where weights are signed and inputs unsigned bytes, so inputs are shifted by 128.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from sparsec.codegen.cpp.codes import codes_of
from sparsec.formats import Format
from sparsec.onnx_inputs import Rounded
from sparsec.onnx_sites import OnnxSite, initializer, shared

if TYPE_CHECKING:
    import onnx_ir as ir

WHY = "weights and inputs of 8 bits, which ONNX Runtime multiplies as MatMulInteger"
_SHIFT = 128


def replace_int8(model: ir.Model, site: OnnxSite, x: Rounded, weight: torch.Tensor, key: str) -> int:
    """Put integers in the place of a site; the bytes of its weight. Raises PatternMismatch where it is on no grid."""
    import onnx_ir as ir

    codes = codes_of(weight, Format.parse("panel+int8"), key)
    named = {"codes": codes.q.t().contiguous().numpy(), "scale": codes.scale[:, 0].contiguous().numpy()}
    q, scale = (initializer(model.graph, f"{site.name}.{name}", array) for name, array in named.items())
    shift = shared(model.graph, "sparsec.shift", np.array(_SHIFT, np.float32))
    zero = shared(model.graph, "sparsec.zero_point", np.array(_SHIFT, np.uint8))
    made: list[ir.Node] = []

    def then(op: str, *inputs: ir.Value, **said: ir.DataType) -> ir.Value:
        made.append(ir.node(op, list(inputs), said, name=f"{site.name}_{op.lower()}_{len(made)}"))
        return made[-1].outputs[0]

    unsigned = then("Cast", then("Add", x.q, shift), to=ir.DataType.UINT8)
    sums = then("Cast", then("MatMulInteger", unsigned, q, zero), to=ir.DataType.FLOAT)
    y = then("Mul", then("Mul", sums, x.scale), scale)
    if site.bias_from is not None:
        y = then("Add", y, site.bias_from)
    nothing = shared(model.graph, "sparsec.nothing", np.array(0.0, np.float32))
    last = shared(model.graph, "sparsec.last_axis", np.array([-1]))
    # No whole number says NaN. Infinities give NaN, too, where the scale comes from them; a fixed scale clips them.
    bad = then("Mul", x.x, nothing) if x.per_token else then("Where", then("IsNaN", x.x), x.x, nothing)
    then("Add", y, then("ReduceSum", bad, last))
    site.put(model.graph, made)
    return sum(v.const_value.nbytes for v in (q, scale) if v.const_value is not None)
