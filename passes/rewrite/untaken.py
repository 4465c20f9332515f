"""Whatever reads a weight matrix and was not taken gets a reason. This rule never matches a site."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, describe, fqn, value_of

_ACTIVATIONS = "a product of activations has no stored weight"
# Names of operations, first match wins; an operation matched by none of them is not linear.
_REASONS: tuple[tuple[str, str], ...] = (
    (r".*grouped_mm.*", "the experts' weights are one 3-D parameter; grouped products are not taken so far"),
    (r"conv_?transpose\d?d?", "transposed convolutions are not taken so far"),
    (r"conv1d", "convolutions over one dimension are not taken so far"),
    (r"conv3d", "convolutions over three dimensions are not taken so far"),
    (r"embedding_bag", "sums of rows of an embedding are not taken so far"),
    (r"multi_head_attention_forward", "fused attention is not taken apart; its projections stay dense"),
    (r"lstm|gru|rnn_\w+", "recurrent layers are not taken so far"),
    (r"einsum|tensordot|bilinear|multi_dot|chain_matmul", "{word} is not taken so far; write it as a linear or matmul"),
    (r"addmm", "addmm is taken only with alpha=1, beta=1 and a stored matrix on the right"),
    (r"b?mm|baddbmm|addbmm|matmul|mv|addmv|dot", _ACTIVATIONS),
    (r".*(linear|matmul|gemm|_mm)|conv2d|convolution", "{word} is not taken so far"),
)


class UntakenRule:
    name = "untaken"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if node.op not in ("call_function", "call_method"):
            return None
        word = describe(node).strip("_")
        reason = next((why for words, why in _REASONS if re.fullmatch(words, word)), None)
        if reason is None:
            return None
        stored = _stored(node, view)
        if stored is not None and reason is _ACTIVATIONS:
            value = value_of(stored)
            reason = f"the stored {value.dim()}-D matrix is not on the right as [K, N]" if value is not None else reason
        return Declined(reason.format(word=word), node.name, fqn(node, stored), word)

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        raise AssertionError("untaken never matches a site")


def _stored(node: Node, view: View) -> Node | None:
    """The parameter that a product reads, directly or through one view."""
    for argument in node.all_input_nodes:
        for source in (argument, *argument.all_input_nodes[:1]):
            if source.op == "placeholder" and not isinstance(view.weight(source), Declined):
                return source
    return None


untaken = UntakenRule()
