"""A 1x1 convolution is a linear over channels: conv2d(x, w) -> sparsec::conv1x1(x, w).

Before: y = conv2d(x, w, b)              w: [N, K, 1, 1], stride 1, no padding, no groups
After:  y = sparsec.conv1x1(x, w, b, plan)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, argument, checked_dtype, fqn, is_call, sizes, value_of


class Conv1x1Rule:
    name = "conv1x1"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if not is_call(node, torch.conv2d, torch.nn.functional.conv2d):
            return None
        x, w, b = (argument(node, i, key) for i, key in enumerate(("input", "weight", "bias")))
        name = fqn(node, w if isinstance(w, Node) and w.op == "placeholder" else None)
        weight = view.weight(w)
        if isinstance(weight, Declined):
            return Declined(weight.reason, node.name, name, "conv2d")
        value = value_of(x)
        declined = _not_pointwise(node, weight)
        if declined is None and (value is None or value.dim() != 4):
            declined = "the input is not a batch of images"
        if declined is not None or value is None:
            return Declined(declined or "", node.name, name, "conv2d")
        dtype = checked_dtype(value, weight)
        if isinstance(dtype, Declined):
            return Declined(dtype.reason, node.name, name, "conv2d")
        bias = b.name if isinstance(b, Node) else None
        n, k = int(weight.shape[0]), int(weight.shape[1])
        return Site(node.name, "conv1x1", w.name, bias, sizes(value), n, k, dtype, name)

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        x, w, b = (argument(node, i, key) for i, key in enumerate(("input", "weight", "bias")))
        return graph.call_function(ops.conv1x1.default, (x, w, b, plan))


def _not_pointwise(node: Node, weight: torch.Tensor) -> str | None:
    if tuple(weight.shape[2:]) != (1, 1):
        return f"the kernel is {'x'.join(map(str, weight.shape[2:]))}; only 1x1 convolutions are taken so far"
    settings: dict[str, Any] = {
        "stride": argument(node, 3, "stride", 1),
        "padding": argument(node, 4, "padding", 0),
        "dilation": argument(node, 5, "dilation", 1),
        "groups": argument(node, 6, "groups", 1),
    }
    plain = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    for key, value in settings.items():
        parts = value if isinstance(value, (tuple, list)) else (value,)
        if key == "dilation" or all(part == plain[key] for part in parts) or value == "valid":
            continue
        return f"the 1x1 convolution has {key}={value}"
    return None


conv1x1 = Conv1x1Rule()
