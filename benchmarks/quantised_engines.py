"""Quantised weights in torch: what sparsec is given, and torch's own integer products.

In: a ``Case`` with ``weights``. Out: a ``Built`` whose error is the difference to float torch on the same grid, with x
as it is: so an engine that rounds more than others shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Case, packed_bytes
from benchmarks.engines import DTYPES, Built, Declines, difference, inputs, reference, weights
from benchmarks.quantised_targets import VALUE_BYTES
from benchmarks.quantised_weights import (
    GRIDS,
    Quantised,
    answers,
    available_bytes,
    float_bytes,
    layer,
    several,
    stack,
    stack_reference,
    token,
)

LARGEST_DEVIATION = {"fp32": 1e-4, "bf16": 3e-2}  # of the compiled program from the one that was compiled
ROOM = 1.5  # of a stack's floats, to build and pack it
STACK_DEVIATION = 3e-2  # a value that falls on the other side of a step of x moves all blocks after it


class Layers(nn.Module):
    """Applies layer ``i`` to input ``i``; with fewer layers than inputs they take turns."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *xs: Tensor) -> list[Tensor]:
        return [self.layers[i % len(self.layers)](x) for i, x in enumerate(xs)]


def on_grid(compile_: Callable[[nn.Module], Callable[..., Any]], case: Case) -> Built:
    """The plain program of the case, compiled. Raises RuntimeError where that changed its answers."""
    if case.kind == "stack":
        return _stack_on_grid(compile_, case)
    tensors = weights(case, packed_bytes(case.n, case.k, case.weights, case.sparsity))
    xs = inputs(case)
    program = Layers([layer(case, tensor) for tensor in tensors])
    run = compile_(program)
    found = run(*xs)
    ends = [program.layers[i % len(tensors)](xs[i]).float() for i in (0, case.calls - 1)]
    checked(difference(found, ends), LARGEST_DEVIATION[case.dtype])
    return Built(lambda: run(*xs), "", difference(found, reference(case, tensors, xs)))


def _stack_on_grid(compile_: Callable[[nn.Module], Callable[..., Any]], case: Case) -> Built:
    needed, there = ROOM * float_bytes(case), available_bytes()
    if needed > there:
        raise Declines(f"the stack needs {needed / 1e9:.0f} GB of memory to build, and {there / 1e9:.0f} GB are free")
    x, wanted = token(case), stack_reference(case)
    model = stack(case)
    run = compile_(model)
    checked(relative(run(x), model(x)), STACK_DEVIATION)
    return Built(lambda: run(x), "", relative(run(x), wanted))


def checked(deviation: float, most: float) -> None:
    if not deviation <= most:
        raise RuntimeError(f"wrong answer: differs from the program that was compiled by {deviation:.2g}")


def relative(found: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference, relative to the largest value."""
    return float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())


def build_torch_int(case: Case) -> Built:
    """What torch brings for such weights: a dynamic quantised linear, or weights unpacked inside the product."""
    if case.kind == "stack":
        raise Declines("stacks run on ONNX Runtime and sparsec only")
    rowwise = case.weights != "int4g128"
    if case.x8 and rowwise:
        return _built(case, dynamic, f"linear_dynamic, {torch.backends.quantized.engine}")
    if case.weights == "ternary":
        raise Declines("torch has no product of ternary weights with x as it is")
    name = "_weight_int8pack_mm" if rowwise else "_weight_int4pack_mm_for_cpu"
    return _built(case, int8_packed if rowwise else int4_packed, name)


Product = Callable[[Tensor], Tensor]


def _built(case: Case, product: Callable[[Case, Quantised], Product], path: str) -> Built:
    width = VALUE_BYTES["int4g128" if product is int4_packed else "int8"]
    kept, xs = several(case, case.n * case.k * width), inputs(case)
    wanted = answers(case, kept, xs)
    products = [product(case, w) for w in kept]

    def call() -> list[Tensor]:
        return [products[i % len(products)](x) for i, x in enumerate(xs)]

    return Built(call, path, difference(call(), wanted))


def dynamic(case: Case, weight: Quantised) -> Product:
    """x is rounded to unsigned bytes, one scale for all tokens."""
    packed = torch.quantize_per_channel(
        weight.dense(), weight.scale[:, 0], torch.zeros(case.n, dtype=torch.long), 0, torch.qint8
    )
    prepared = torch.ops.quantized.linear_prepack(packed, None)
    run = torch.ops.quantized.linear_dynamic
    return lambda x: run(x, prepared, False)


def int8_packed(case: Case, weight: Quantised) -> Product:
    run = operator("_weight_int8pack_mm")
    scale = weight.scale[:, 0].to(DTYPES[case.dtype])
    return lambda x: run(x, weight.q, scale)


def int4_packed(case: Case, weight: Quantised) -> Product:
    """Stored as q + 8 and a pair for each group, the scale and the value of 8, which is 0."""
    packed = operator("_convert_weight_to_int4pack_for_cpu")((weight.q + 8).int(), 1)
    scale = weight.scale.t().contiguous()
    pairs = torch.stack([scale, torch.zeros_like(scale)], -1).to(DTYPES[case.dtype])
    run, group = operator("_weight_int4pack_mm_for_cpu"), GRIDS[case.weights][1]
    return lambda x: run(x, packed, group, pairs)


def operator(name: str) -> Callable[..., Any]:
    """An operator of ATen by its name. Raises Declines where this torch has none."""
    found: Callable[..., Any] | None = getattr(torch.ops.aten, name, None)
    if found is None:
        raise Declines(f"this torch has no {name}")
    return found
