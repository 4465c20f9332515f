"""Dense weights of 4 bits in standard ONNX: codes, scales and zero points in, ``DequantizeLinear`` and ``MatMul`` out.

ONNX Runtime fuses the two into ``MatMulNBits``; any other runtime of opset 21 dequantises. Half a byte a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sparsec.codegen.cpp.codes import codes_of
from sparsec.facts import WeightFact
from sparsec.formats import Format, stored_types, value_kind
from sparsec.onnx_sites import OnnxSite, initializer

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21  # from which DequantizeLinear has blocks
GROUPS = (16, 32, 64, 128, 256)  # that ONNX Runtime fuses
WHY = "4 bits a weight, which ONNX Runtime multiplies as MatMulNBits"


def low_bit(fact: WeightFact) -> str:
    """The value type of 4 bits with groups that a weight lies on, as ``int4g32``; "" where it lies on none."""
    for name in stored_types(fact.values):
        kind, group = value_kind(name)
        if kind == "int4" and (group or fact.k) in GROUPS and fact.k % (group or fact.k) == 0:
            return name
    return ""


def replace_low_bit(model: ir.Model, site: OnnxSite, weight: torch.Tensor, values: str, key: str) -> int:
    """Put codes in the place of a site's weight; their bytes. Raises PatternMismatch where it is on no such grid."""
    import ml_dtypes
    import onnx_ir as ir

    codes = codes_of(weight, Format.parse(f"panel+{values}"), key)
    small = {
        "codes": codes.unsigned().t().contiguous().numpy().astype(ml_dtypes.uint4),
        "scale": codes.scale.t().contiguous().numpy(),
        "zero": codes.zero.t().contiguous().numpy().astype(ml_dtypes.uint4),
    }
    held = [initializer(model.graph, f"{site.name}.{name}", array) for name, array in small.items()]
    said = {"axis": 0, "block_size": codes.group or weight.shape[1]}
    wide = ir.node("DequantizeLinear", held, said, name=f"{site.name}_dequantize")
    product = ir.node("MatMul", [site.x, wide.outputs[0]], name=f"{site.name}_product")
    nodes = [wide, product]
    if site.bias_from is not None:
        nodes.append(ir.node("Add", [product.outputs[0], site.bias_from], name=f"{site.name}_bias"))
    site.put(model.graph, nodes)
    return sum(v.const_value.nbytes for v in held if v.const_value is not None)
