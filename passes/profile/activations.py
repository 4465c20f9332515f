"""Which values of a graph have zeros, and whose results nobody reads: a Dynamo graph in, facts of nodes out.

Forward, ``zeros`` gives each node an ``ActFact``; the functions of ``transfer`` say what an operation does to one.
Backward, ``needed_of`` says where a value is read at all. Both only read, and both say what holds for finite values:
0 * inf and 0 / 0 are NaN in eager mode, and whoever skips a zero makes them 0, as kernels that skip zero weights do. A
fact is a hint of what pays, never a promise that a kernel may read less than it checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch.fx import Graph, Node

from sparsec.facts import ActFact, Site
from sparsec.passes.graph import View, argument
from sparsec.passes.profile.aliases import overwritten
from sparsec.passes.profile.call import shape_of
from sparsec.passes.profile.needed import needed_of
from sparsec.passes.profile.transfer import TOP, Call, transferred


def zeros(graph: Graph, view: View) -> Mapping[Node, ActFact]:
    """What is known of the zeros of every node. A value that something writes to later is ``top``.

    The values of stored masks are read where they are at hand, so call it outside of Dynamo's fake mode.
    """
    facts: dict[Node, ActFact] = {}
    lost = overwritten(graph)

    def of(value: Any) -> ActFact:
        return facts.get(value, TOP) if isinstance(value, Node) else TOP

    for node in graph.nodes:
        facts[node] = TOP if node in lost else transferred(Call(node, of, view))
    return facts


def annotated(sites: Iterable[Site], graph: Graph, view: View) -> list[Site]:
    """The sites with ``gate`` (what is known of the zeros of x) and ``needed`` (where their results are read)."""
    facts = zeros(graph, view)
    named = {node.name: node for node in graph.nodes}
    sites = list(sites)
    needed = needed_of(graph, facts, [named[site.node] for site in sites])
    found = []
    for site in sites:
        node = named[site.node]
        x = facts.get(named[site.reads] if site.reads else argument(node, 0, "input"), TOP)
        mask = needed.get(node)
        if mask is not None and (site.conv is None or shape_of(mask) == shape_of(node)):
            site = replace(site, needed=mask.name, needed_fact=facts[mask])
        found.append(replace(site, gate=_of_rows(x, site) if x.zeros else None))
    return found


def _of_rows(fact: ActFact, site: Site) -> ActFact:
    """The fact of x as rows [M, K]: a 1x1 convolution has K in the second dimension, where patterns are not."""
    if site.conv is None or not fact.pattern:
        return fact
    return replace(fact, pattern="", state="exact" if fact.rate is not None else "likely")
