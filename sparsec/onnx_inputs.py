"""Whether the input of an ONNX layer is rounded to int8, as ``passes/quantize/inputs.py`` writes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsec.onnx_sites import constant

if TYPE_CHECKING:
    import onnx_ir as ir

_TOP = 127.0
_MOST_SCALE = 1e36  # as the operators take it


@dataclass(frozen=True)
class Rounded:
    """``x`` was rounded to ``q * scale``; ``q`` holds whole numbers as floats. ``per_token``: scale is max|x| / 127 of
    the last axis and 1 where that is zero; else it is one constant."""

    x: ir.Value
    q: ir.Value
    scale: ir.Value
    per_token: bool

    @property
    def fixed(self) -> float:
        """The one scale; 0 where each token has its own."""
        return 0.0 if self.per_token else _number(self.scale) or 0.0


def rounded(value: ir.Value) -> Rounded | None:
    """How ``value = clamp(round(x / s), -127, 127) * s`` was made; None where it is not that."""
    product = _made_by(value, "Mul")
    if product is None:
        return None
    for q, scale in (tuple(product.inputs), tuple(product.inputs[::-1])):
        clip = _made_by(q, "Clip")
        if clip is None or [_number(v) for v in clip.inputs[1:]] != [-_TOP, _TOP]:
            continue
        nearest = _made_by(clip.inputs[0], "Round")
        steps = _made_by(nearest.inputs[0], "Div") if nearest is not None else None
        if steps is None or steps.inputs[1] is not scale:
            continue
        x = steps.inputs[0]
        per_token = x is not None and _is_scale_of(scale, x)
        if (
            x is not None
            and q is not None
            and scale is not None
            and (per_token or (0.0 < (_number(scale) or 0.0) < _MOST_SCALE and _adds_no_axes(scale, x)))
        ):
            return Rounded(x, q, scale, per_token)
    return None


def _adds_no_axes(scale: ir.Value, x: ir.Value) -> bool:
    held, axes = constant(scale), 1 if x.shape is None else len(x.shape)
    return held is not None and len(held.shape) <= axes


def _is_scale_of(scale: ir.Value | None, x: ir.Value) -> bool:
    choice = _made_by(scale, "Where")
    if choice is None:
        return False
    is_zero, one, exact = choice.inputs
    equal = _made_by(is_zero, "Equal")
    if equal is None or exact not in equal.inputs or _number(one) != 1.0:
        return False
    if not any(_number(v) == 0.0 for v in equal.inputs):
        return False
    division = _made_by(exact, "Div")
    if division is None or _number(division.inputs[1]) != _TOP:
        return False
    largest = _made_by(division.inputs[0], "ReduceMax")
    size = _made_by(largest.inputs[0], "Abs") if largest is not None else None
    return size is not None and size.inputs[0] is x and largest is not None and _over_last_axis(largest, x)


def _over_last_axis(node: ir.Node, x: ir.Value) -> bool:
    axes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    keep = node.attributes.get("keepdims")
    if axes is None or (keep is not None and not keep.value):
        return False
    last = [-1] if x.shape is None else [-1, len(x.shape) - 1]
    return axes.numpy().ravel().tolist() in [[axis] for axis in last]


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def _number(value: ir.Value | None) -> float | None:
    """The only element of a constant."""
    held = constant(value)
    return float(held.numpy().reshape(-1)[0]) if held is not None and held.size == 1 else None
