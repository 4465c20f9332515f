"""An embedding is no product: it stays as it is, and is named, so that the report says what can be done for it.

Before: y = embedding(ids, w)
After:  the same
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, argument, fqn, is_call

_WHY = "an embedding reads only the rows it is asked for, so zeros save it no time; sparsec.pack_ saves their memory"


class EmbeddingRule:
    name = "embedding"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if not is_call(node, torch.embedding, torch.nn.functional.embedding):
            return None
        first = node.target is torch.embedding
        w = argument(node, 0 if first else 1, "weight")
        return Declined(_WHY, node.name, fqn(node, w if isinstance(w, Node) else None), "embedding")

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        raise AssertionError("embedding never matches a site")


embedding = EmbeddingRule()
