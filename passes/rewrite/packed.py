"""A layer packed in place (``sparsec.pack_``) is a call of an op on its pack already: it stays, and is named.

Before: y = sparsec.linear_packed(x, b, [meta, tensors ...], n), or sparsec.embedding_packed(ids, [meta, ...], k, dtype)
After:  the same
"""

from __future__ import annotations

import json
from typing import Any

from torch.fx import Graph, Node

from sparsec.compat import real_tensors, source_name
from sparsec.facts import Declined, Site
from sparsec.passes.graph import View, argument

_PACK_AT = {"linear_packed": 2, "embedding_packed": 1}  # op -> which argument its pack is


class PackedRule:
    name = "packed"

    def match(self, node: Node, view: View) -> Site | Declined | None:
        op = next((op for op in _PACK_AT if str(node.target).startswith(f"sparsec.{op}")), None)
        if op is None:
            return None
        pack = argument(node, _PACK_AT[op], "pack")
        name = source_name(pack[0]).removesuffix("._pack") if isinstance(pack[0], Node) else ""
        return Declined(_said(pack, view), node.name, name, op)

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
