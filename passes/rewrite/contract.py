"""A rule recognises one form of a linear operation and puts the sparse op in its place.

``match`` reads the graph and returns a Site, a Declined with the reason, or None when the node is not its business.
``emit`` inserts the new node before the old one and returns it; the caller replaces the uses. ``ops`` is the namespace
of the target's ops: ``torch.ops.sparsec`` or ``torch.ops.sparsec_gpu``. A rule keeps no state.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch.fx import Graph, Node

from sparsec.facts import Declined, Site
from sparsec.passes.graph import View


class Rule(Protocol):
    name: str

    def match(self, node: Node, view: View) -> Site | Declined | None: ...

    def emit(self, graph: Graph, node: Node, plan: str, ops: Any) -> Node: ...
