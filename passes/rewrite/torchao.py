"""Weights as ``torchao.quantize_`` leaves them: a tensor subclass that holds integers and scales.

Before: y = linear(x, w, b)                                          w: Int8Tensor, a parameter
After:  y = sparsec.linear_codes(x, [w.qdata, w.scale], b, plan)     the plan says qdata.to(dtype) * scale

Dynamo hands the subclass over whole; what its own ``linear`` would do is known only by its fields. torchao is never
imported: a model that holds such a weight has done that.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch.fx import Node

from sparsec.facts import Declined
from sparsec.passes.graph import View, short

_INPUTS = ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale")


def int8_weight(node: Any, view: View) -> tuple[tuple[str, str], str] | Declined | None:
    """(the parts ``node.qdata`` and ``node.scale``, the text of their expression) of an Int8Tensor with floating-point
    inputs; None where ``node`` is none of torchao's tensors."""
    value = view.examples.get(node) if isinstance(node, Node) else None
    if value is None or not view.stored(node) or not type(value).__module__.startswith("torchao."):
        return None
    name = type(value).__name__
    if name != "Int8Tensor":
        return Declined(
            f"the weight is torchao's {name}, which is not taken so far; weight.dequantize() gives its values, and "
            "sparsec finds their grid by itself"
        )
    if any(getattr(value, field, None) is not None for field in _INPUTS):
        return Declined(
            "torchao rounds the inputs of this layer to steps of max|x| / 127.5 and by a reciprocal, which no kernel "
            "here computes exactly; use Int8WeightOnlyConfig, or sparsify with smoothquant or rtn, activations: int8"
        )
    q, scale = getattr(value, "qdata", None), getattr(value, "scale", None)
    if not _per_row(q, scale, value):
        return Declined("the weight is torchao's Int8Tensor with another scale than one for each row")
    text = ["mul", [["to", [{"part": 0}, {"dtype": short(value.dtype)}], {}], {"part": 1}], {}]
    return (f"{node.name}.qdata", f"{node.name}.scale"), json.dumps(text, separators=(",", ":"))


def _per_row(q: Any, scale: Any, value: torch.Tensor) -> bool:
    if not isinstance(q, torch.Tensor) or not isinstance(scale, torch.Tensor) or value.dim() != 2:
        return False
    return (
        q.dtype == torch.int8 and q.shape == value.shape and scale.shape == (len(q), 1) and scale.dtype == value.dtype
    )
