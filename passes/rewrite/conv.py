"""A convolution is a product with the patches of its images: conv2d(x, w) -> sparsec::conv2d(x, w).

Before: y = conv2d(x, w, b, stride, padding, dilation)             w: [N, C, high, wide], no groups
After:  y = sparsec.conv2d(x.contiguous(memory_format=channels_last), w, b, plan).contiguous()

The plan says how it walks. Both conversions of the memory format stand in the graph, and only where x or y are not
channels_last already: Inductor fuses them with what is done to x and y, so between two convolutions there are none.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Conv, Declined, Site
from sparsec.passes.graph import View, argument, checked_dtype, fqn, is_call, sizes, value_of


class ConvRule:
    name = "conv2d"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if not is_call(node, torch.conv2d, torch.nn.functional.conv2d):
            return None
        x, w, b = operands(node)
        name = fqn(node, w if isinstance(w, Node) and w.op == "placeholder" else None)

        def no(reason: str) -> Declined:
            return Declined(reason, node.name, name, "conv2d")

        weight, value, made = view.weight(w), value_of(x), value_of(node)
        if isinstance(weight, Declined):
            return no(weight.reason)
        if value is None or made is None or value.dim() != 4 or weight.dim() != 4:
            return no("the input is not a batch of images")
        walk = walk_of(node, weight)
        if isinstance(walk, str):
            return no(walk)
        dtype = checked_dtype(value, weight)
        if isinstance(dtype, Declined):
            return no(dtype.reason)
        image = tuple(size for i, size in enumerate(sizes(value)) if i != 1 and isinstance(size, int))
        if len(image) == 3:  # the others are symbolic
            walk = replace(walk, image=image)
        n, k = int(weight.shape[0]), weight[0].numel()
        batch, _, high, wide = sizes(made)
        bias = b.name if isinstance(b, Node) else None
        return Site(node.name, "conv2d", w.name, bias, (batch, high, wide, k), n, k, dtype, name, conv=walk)

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        x, w, b = operands(node)
        if not channels_last(value_of(x)):
            x = graph.call_method("contiguous", (x,), {"memory_format": torch.channels_last})
        new = graph.call_function(ops.conv2d.default, (x, w, b, plan))
        return new if channels_last(value_of(node)) else graph.call_method("contiguous", (new,))


def operands(node: Node) -> tuple[Any, Any, Any]:
    """(x, weight, bias) of a convolution, given by position or keyword."""
    return argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")


def channels_last(value: torch.Tensor | None) -> bool:
    return value is not None and value.is_contiguous(memory_format=torch.channels_last)


def walk_of(node: Node, weight: torch.Tensor) -> Conv | str:
    """How a convolution walks, or why it is not taken."""
    if (groups := argument(node, 6, "groups", 1)) != 1:
        what = "depthwise" if weight.shape[1] == 1 else "grouped"
        return f"the convolution is {what} (groups={groups}): each product is too small to gain from its zeros"
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    stride, dilation = _pair(argument(node, 3, "stride", 1)), _pair(argument(node, 5, "dilation", 1))
    padding = argument(node, 4, "padding", 0)
    if stride is None or dilation is None:
        return "the stride or the dilation of the convolution is not a fixed number"
    if isinstance(padding, str):
        around = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        (high, wide) = around
        return Conv(kernel, stride, (high // 2, high - high // 2, wide // 2, wide - wide // 2), dilation)
    pads = _pair(padding)
    if pads is None:
        return "the padding of the convolution is not a fixed number"
    return Conv(kernel, stride, (pads[0], pads[0], pads[1], pads[1]), dilation)


def _pair(said: Any) -> tuple[int, int] | None:
    parts = tuple(said) if isinstance(said, (tuple, list)) else (said,)
    if not 1 <= len(parts) <= 2 or not all(type(part) is int for part in parts):
        return None
    return int(parts[0]), int(parts[-1])


conv2d = ConvRule()
