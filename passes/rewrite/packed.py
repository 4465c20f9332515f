"""A layer packed in place (``sparsec.pack_``) is a call of sparsec::linear_packed already: it stays, and is named.

Before: y = sparsec.linear_packed(x, b, [meta, tensors ...], n)
After:  the same
"""

from __future__ import annotations

import json
from typing import Any

from torch.fx import Graph, Node

from sparsec.compat import real_tensors, source_name
from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, argument


class PackedRule:
    name = "packed"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        if not str(node.target).startswith("sparsec.linear_packed"):
            return None
        pack = argument(node, 2, "pack")
        name = source_name(pack[0]).removesuffix("._pack") if isinstance(pack[0], Node) else ""
        return Declined(_said(pack, view), node.name, name, "linear_packed")

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node:
        raise AssertionError("packed never matches a site")


def _said(pack: Any, view: View) -> str:
    try:
        with real_tensors():
            meta = json.loads(bytes(view.examples[pack[0]].tolist()))
        return f"already packed as {meta['format']}; the report of sparsec.pack_ has its bytes"
    except (KeyError, ValueError, TypeError):
        return "already packed"


packed = PackedRule()
