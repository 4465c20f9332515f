"""Reading a Dynamo graph: which inputs are weights, what a node is called, what shape it has.

In: the GraphModule and example inputs that Dynamo hands a backend. Nothing here changes the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from sparsec.compat import is_fake, source_name, static_input
from sparsec.facts import Declined

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
TAKES = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16", "fp16")}  # dtypes of x that kernels of a device exist for


@dataclass(frozen=True)
class View:
    """A graph as rules see it. ``examples`` maps placeholder nodes to the real values Dynamo gave.

    ``device``: the kind of device that weights must be on, ``cpu`` or ``cuda``.
    """

    graph: torch.fx.Graph
    examples: Mapping[Node, Any]
    device: str = "cpu"

    @classmethod
    def of(cls, gm: torch.fx.GraphModule, example_inputs: Sequence[Any], device: str = "cpu") -> View:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        return cls(gm.graph, dict(zip(placeholders, example_inputs, strict=True)), device)

    def stored(self, node: Any) -> bool:
        """Whether a node is a parameter, buffer or attribute of a module: an input that outlives the call."""
        if not isinstance(node, Node) or node.op != "placeholder":
            return False
        return static_input(node) or isinstance(self.examples[node], torch.nn.Parameter)

    def weight(self, node: Any) -> torch.Tensor | Declined:
        """The real tensor behind a node, if it is a weight that keeps its identity from call to call."""
        if not isinstance(node, Node):
            return Declined("the weight is a constant in the code")
        if node.op == "get_attr":
            return Declined("the weight was frozen into the graph; compile without prepare_freezing")
        if node.op != "placeholder":
            return Declined(_computed(node), node.name)
        value = self.examples[node]
        if not isinstance(value, torch.Tensor):
            return Declined("the weight is not a tensor", node.name)
        if is_fake(value):
            return Declined("the weight has a shape but no values yet", node.name)
        if not self.stored(node):
            return Declined("the weight is an argument of the function, not a parameter of a module", node.name)
        if type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
            return Declined(f"the weight is a {type(value).__name__}, a tensor subclass", node.name)
        if value.device.type != self.device:
            where = {"cpu": "the CPU", "cuda": "a GPU"}[self.device]
            return Declined(f"the weight is on {value.device}; this target runs on {where}", node.name)
        if value.layout != torch.strided:
            return Declined(f"the weight already has the layout {value.layout}", node.name)
        return value


def _computed(node: Node) -> str:
    if any(
        source_name(n).endswith(("weight_orig", "weight_mask")) for n in node.all_input_nodes if n.op == "placeholder"
    ):
        return (
            "the weight is multiplied by a mask at every call; make the mask permanent with "
            "torch.nn.utils.prune.remove(module, 'weight')"
        )
    return f"the weight is computed in the graph ({describe(node)}), not a parameter"


def checked_dtype(x: torch.Tensor, weight: torch.Tensor) -> str | Declined:
    """``fp32``, ``bf16`` or, on a GPU, ``fp16`` when x and weight agree on one of them."""
    if x.dtype != weight.dtype:
        return Declined(f"x is {short(x.dtype)} and the weight {short(weight.dtype)}; they must be the same")
    kind = "cuda" if weight.is_cuda else "cpu"
    if DTYPES.get(x.dtype) not in TAKES[kind]:
        others = {"cpu": "float32 and bfloat16", "cuda": "float32, bfloat16 and float16"}[kind]
        return Declined(f"{short(x.dtype)} has no {kind.upper()} kernel yet; {others} have")
    return DTYPES[x.dtype]


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def value_of(node: Any) -> torch.Tensor | None:
    """The fake tensor that Dynamo computed for a node, if it is a tensor."""
    value = node.meta.get("example_value") if isinstance(node, Node) else None
    return value if isinstance(value, torch.Tensor) else None


def sizes(tensor: torch.Tensor) -> tuple[int | str, ...]:
    """The shape with symbolic sizes as text."""
    return tuple(int(s) if isinstance(s, int) else str(s) for s in tensor.shape)


def fqn(node: Node, weight: Node | None = None) -> str:
    """Name of the layer as the user knows it: the module path, else the parameter's path, else the node's name.

    The weight's own path wins when the module stack does not lead to it (a parameter used by a parent module), but not
    over a layer that shares it: a head tied to an embedding is called by its own name.
    """
    owner = source_name(weight) if weight is not None else ""
    module, _, leaf = owner.rpartition(".")
    stack = node.meta.get("nn_module_stack") or {}
    path, kind = list(stack.values())[-1] if stack else ("", "")
    inner: str = path.partition("]")[2].lstrip(".") or (path.partition(".")[2] if "]" not in path else "")
    if leaf == "weight" and module:
        own = getattr(kind, "__name__", str(kind)).rpartition(".")[2] in ("Linear", "Conv1D", "Embedding")
        return inner if own and inner and "[" not in inner else module
    return owner or inner or node.name


def erase_unused(graph: torch.fx.Graph, node: Node) -> None:
    """Erase a call that nothing reads, and what only it read; what writes in place stays."""
    todo, gone = [node], set[Node]()
    while todo:
        here = todo.pop()
        if here in gone or here.op not in ("call_function", "call_method") or here.users or writes(here):
            continue
        todo += here.all_input_nodes
        gone.add(here)
        graph.erase_node(here)


def writes(node: Node) -> bool:
    """Whether a call changes one of its arguments, by its name: ``add_``, ``setitem``, ``iadd``, ``out=``."""
    word = describe(node)
    if word in ("and_", "or_", "not_", "is_"):  # of the module operator, where the name is a keyword
        return False
    if word.endswith("_") and not word.endswith("__"):
        return True
    return word in ("setitem", "iadd", "isub", "imul", "itruediv", "iand", "ior") or "out" in node.kwargs


def describe(node: Node) -> str:
    """A node's operation in a word: ``mul``, ``getitem``, ``relu``."""
    if node.op == "call_method":
        return str(node.target)
    return getattr(node.target, "__name__", str(node.target))


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    """A positional or keyword argument of a call."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def is_call(node: Node, *targets: Callable[..., Any]) -> bool:
    return node.op == "call_function" and node.target in targets
