"""Which linear layers and embeddings of a model can be packed in place, under which names, and why others cannot."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsec.passes.graph import DTYPES, TAKES, short
from sparsec.passes.quantize.inputs import inputs_of, plain_class

# Modules that read the weights of their children themselves, past their forward.
_READERS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


@dataclass
class Found:
    """One weight of linear layers or embeddings: its places in the model, or why it must stay dense.

    ``weight`` is dropped by ``replace``. ``kind``: ``Linear`` or ``Conv1D``. ``tied``: the other names of layers that
    share it. ``x``: how they round their inputs (``inputs_of``).
    """

    name: str
    modules: list[nn.Module]
    places: list[tuple[nn.Module, str]]  # (parent, name there)
    kind: str = "Linear"
    tied: tuple[str, ...] = ()
    refusal: str = ""
    x: str = ""
    weight_trained: bool = field(init=False)

    def __post_init__(self) -> None:
        self.weight_trained = self.weight.requires_grad

    @property
    def transposed(self) -> bool:
        """Whether the weight is stored [K, N]."""
        return self.kind == "Conv1D"

    @property
    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.modules[0]._parameters["weight"]  # type: ignore[assignment]
        return weight

    @property
    def multiplies(self) -> bool:
        """Whether a linear layer reads the weight; embeddings alone only look rows up."""
        return any(is_linear(module) for module in self.modules)

    @contextlib.contextmanager
    def laid_in_rows(self) -> Iterator[None]:
        """Store a [K, N] weight so that its [N, K] view is contiguous, as profiling and packing read it.

        Working on a copy would hold the weight twice beside its pack. What is still there at the end is laid back.
        """
        self._lay(self.weight.detach().t().contiguous().t())
        yield
        if self.modules:
            self._lay(self.weight.detach().contiguous())

    def _lay(self, values: torch.Tensor) -> None:
        for module in self.modules:
            module._parameters["weight"].data = values  # type: ignore[union-attr]

    def replace(self, make: Callable[[nn.Module], nn.Module]) -> None:
        """Put a new module in every place; one that stood in several places stays one. The old ones let go."""
        made = {id(module): make(module) for module in self.modules}
        for parent, child in self.places:
            parent._modules[child] = made[id(parent._modules[child])]
        self.modules.clear()


def find_layers(model: nn.Module) -> Iterator[Found]:
    """Every weight of linear layers and embeddings, in the order of the model, and convolutions, which are refused;
    those that share one come once.

    A generator would keep weights alive that were packed before, so what it yields holds modules, not weights.
    """
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    others: dict[object, str] = {}
    parents = dict(model.named_modules(remove_duplicate=False))
    for name, module in parents.items():
        parent = parents.get(name.rpartition(".")[0])
        if (is_packable(module) or is_convolution(module)) and parent is not None and module is not model:
            at = places.setdefault(id(module), [])
            if not at:
                groups.setdefault(_key(module._parameters["weight"]), []).append((name, module))
            if (parent, name.rpartition(".")[2]) not in at:
                at.append((parent, name.rpartition(".")[2]))
            continue
        for own, parameter in module._parameters.items():
            if parameter is not None:
                others.setdefault(_key(parameter), f"{name}.{own}".lstrip("."))
    for key, members in groups.items():
        names, modules = [name for name, _ in members], [module for _, module in members]
        yield Found(
            names[0],
            modules,
            [place for module in modules for place in places[id(module)]],
            kind=next(filter(None, map(kind_of, modules)), ""),
            tied=tuple(names[1:]),
            refusal=_tied(others.get(key, "")) or _refusal(modules, [p for m in modules for p, _ in places[id(m)]]),
            x=next((inputs_of(module) for module in modules if kind_of(module)), ""),
        )


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear`` itself, transformers' ``Conv1D``, or one of them that rounds its inputs: another subclass may do
    anything in its forward."""
    return bool(kind_of(module)) and isinstance(module._parameters.get("weight"), torch.Tensor)


def kind_of(module: nn.Module) -> str:
    """``Linear``, ``Conv1D``, or "" for any other module."""
    kind = plain_class(type(module))
    if kind is nn.Linear:
        return "Linear"
    return "Conv1D" if kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") else ""


def is_packable(module: nn.Module) -> bool:
    """A linear layer, or ``nn.Embedding`` itself, unless it rescales the rows it reads (``max_norm``)."""
    if is_linear(module):
        return True
    return type(module) is nn.Embedding and module.max_norm is None and "weight" in module._parameters


def is_convolution(module: nn.Module) -> bool:
    return type(module) is nn.Conv2d and isinstance(module._parameters.get("weight"), torch.Tensor)


def _key(parameter: object) -> object:
    assert isinstance(parameter, torch.Tensor)
    if parameter.numel() == 0 or parameter.device.type == "meta":
        return id(parameter)
    return parameter.data_ptr(), tuple(parameter.shape)


def _tied(other: str) -> str:
    return f"its weight is tied to {other}, which reads it dense" if other else ""


def _refusal(modules: list[nn.Module], parents: list[nn.Module]) -> str:
    weight = modules[0]._parameters["weight"]
    assert weight is not None
    reader = next((p for p in parents if isinstance(p, _READERS)), None)
    if reader is not None:
        return f"nn.{type(reader).__name__} reads the weights of its layers itself"
    if any(is_convolution(module) for module in modules):
        return "convolutions are not packed in place so far; torch.compile packs them beside their dense weights"
    kinds = {kind_of(module) or type(module).__name__ for module in modules}
    if len(kinds) > 1 and kinds != {"Linear", "Embedding"}:
        return "layers of different kinds share its weight"
    if len({inputs_of(module) for module in modules if kind_of(module)}) > 1:
        return "layers that share its weight round their inputs differently"
    if any("_hf_hook" in vars(module) for module in modules):
        return "it is offloaded by accelerate: its weight comes and goes with every call"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}, a tensor subclass"
    if weight.device.type == "meta":
        return "its weight has a shape but no values yet"
    if weight.device.type != "cpu":
        return f"its weight is on {weight.device}; packs are for CPUs"
    if weight.layout != torch.strided:
        return f"its weight already has the layout {weight.layout}"
    if DTYPES.get(weight.dtype) not in TAKES["cpu"]:
        return f"{short(weight.dtype)} has no CPU kernel yet; float32 and bfloat16 have"
    bias = modules[0]._parameters.get("bias")
    if bias is not None and bias.dtype != weight.dtype:
        return f"its bias is {short(bias.dtype)} and its weight {short(weight.dtype)}"
    return ""
