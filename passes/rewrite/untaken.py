"""Whatever multiplies by a matrix and was not taken gets a reason. This rule never matches a site."""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, describe, fqn, value_of

_REASONS = {
    F.conv1d: "convolutions over one dimension are not taken so far",
    torch.conv1d: "convolutions over one dimension are not taken so far",
    torch.conv3d: "convolutions over three dimensions are not taken so far",
    torch.conv_transpose1d: "transposed convolutions are not taken so far",
    torch.conv_transpose2d: "transposed convolutions are not taken so far",
    torch.bmm: "a batched product of activations has no stored weight",
    torch.baddbmm: "a batched product of activations has no stored weight",
    torch.einsum: "einsum is not taken so far; write it as a linear or matmul",
    torch.bilinear: "bilinear is not taken so far",
    F.bilinear: "bilinear is not taken so far",
    F.multi_head_attention_forward: "fused attention is not taken apart; its projections stay dense",
    torch.addmm: "addmm is taken only with alpha=1, beta=1 and a stored matrix on the right",
    torch.addbmm: "a batched product of activations has no stored weight",
    torch.chain_matmul: "chain_matmul is not taken so far",
    torch.linalg.multi_dot: "multi_dot is not taken so far",
    torch.matmul: "a product of activations has no stored weight",
    torch.mm: "a product of activations has no stored weight",
    operator.matmul: "a product of activations has no stored weight",
}
_NAMES = {
    "matmul": "a product of activations has no stored weight",
    "bmm": "a batched product of activations has no stored weight",
    "addmm": "addmm is taken only with alpha=1, beta=1 and a stored matrix on the right",
    "_grouped_mm": "the experts' weights are one 3-D parameter; grouped products are not taken so far",
    "grouped_mm": "the experts' weights are one 3-D parameter; grouped products are not taken so far",
    "lstm": "recurrent layers are not taken so far",
    "gru": "recurrent layers are not taken so far",
}


class UntakenRule:
    name = "untaken"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if node.op not in ("call_function", "call_method"):
            return None
        word = describe(node)
        reason = _REASONS.get(node.target) if node.op == "call_function" else None  # type: ignore[arg-type]
        reason = reason or _NAMES.get(word)
        if reason is None:
            return None
        stored = [a for a in node.args if isinstance(a, Node) and not isinstance(view.weight(a), Declined)]
        if stored and "no stored weight" in reason:
            value = value_of(stored[0])
            dims = f"{value.dim()}-D " if value is not None else ""
            reason = f"the stored {dims}matrix is not on the right as [K, N]"
        return Declined(reason, node.name, fqn(node, stored[0] if stored else None), word)

    def emit(self, graph: Graph, node: Node, plan: str) -> Node:
        raise AssertionError("untaken never matches a site")


untaken = UntakenRule()
