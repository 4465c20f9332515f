"""Where gates stand: layers that gate what they read or give, and activations that gate their output.

In: a model, the name of a module, a ``Place`` and a gate. The module keeps its name, its parameters and its hooks:

  input       y = linear(gate(x))            a subclass of the layer's class, ``layer.gate``
  output      y = mask(linear(x), x)         the same subclass, ``layer.mask``
  activation  y = gate(act(x))               ``GatedActivation`` in the place of the activation, ``act_fn.gate``

Gates come before the rounding of int8 inputs (``quantize.inputs``), which keeps their zeros. ``described`` and
``restored`` carry gates over to a model of the same kind that has none; values of buffers travel in its state dict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsec.passes.gates.contract import Place
from sparsec.passes.gates.forms import TOKENS, Centred, Gate, made, width_of
from sparsec.passes.quantize.inputs import QuantizedInputLinear, QuantizesInput

Undo = Callable[[], None]
_SLOT: Mapping[str, str] = {"input": "gate", "output": "mask", "activation": "gate"}


class Gated(nn.Module):
    """The half that layers share; stands before the class of the layer itself."""

    gate: Gate | None
    mask: Gate | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(x if self.gate is None else self.gate(x))  # type: ignore[misc]
        return y if self.mask is None else self.mask(y, x)


class GatedLinear(Gated, nn.Linear):
    """``nn.Linear`` that zeroes some of what it reads or gives."""


class GatedQuantizedLinear(Gated, QuantizedInputLinear):
    """``nn.Linear`` that zeroes some of its input, then rounds the rest to int8."""


class GatedActivation(nn.Module):
    """An activation function, and a gate on what it gives."""

    def __init__(self, act: nn.Module, gate: Gate) -> None:
        super().__init__()
        self.act, self.gate = act, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.gate(self.act(x))
        return y


def refusal(module: nn.Module, place: Place) -> str:
    """Why a module cannot be gated there; "" where it can, or is already."""
    if place == "activation" or isinstance(module, Gated):
        return ""
    if "forward" in vars(module):
        return "its forward was replaced"
    if type(module) in (nn.Linear, QuantizedInputLinear) or type(module).__name__ in ("Conv1D", "QuantizedInputConv1D"):
        return ""
    return f"it is a {type(module).__name__}, and only nn.Linear and Conv1D gate their inputs"


def put(model: nn.Module, name: str, place: Place, gate: Gate) -> Undo:
    """Gate the module ``name`` in place; one that is gated there already gets the new gate. Gives what undoes it.

    A shift of the mode is folded: the bias becomes b + W c. Raises ValueError with the words of ``refusal``, for a gate
    of another width, and where a folded shift would have to be taken back.
    """
    module = model.get_submodule(name)
    _check(module, place, gate)
    home = model.get_submodule(name.rpartition(".")[0])  # an activation has no tensor that says where it runs
    device = next((t.device for owner in (module, home, model) for t in owner.parameters()), torch.device("cpu"))
    gate.to(device).train(module.training)
    return _put_activation(model, name, gate) if place == "activation" else _put_layer(module, place, gate)


def _check(module: nn.Module, place: Place, gate: Gate) -> None:
    if why := refusal(module, place):
        raise ValueError(why)
    there = getattr(module, _SLOT[place], None)
    if isinstance(there, Centred):
        raise ValueError("its bias holds the shift of the mode that a step before gated it by; load the model again")
    if place == "activation":
        return
    n, k = shape_of(module)
    wide, has = width_of(gate), k if place == "input" else n
    if wide is not None and wide != has:
        raise ValueError(f"the gate is {wide} wide, and what it would act on is {has} wide: it is of another model")
    reads = getattr(gate, "reads", None)
    if reads is not None and reads != k:
        raise ValueError(f"the predictor reads {reads} features, and the layer has {k}: it is of another model")


def _put_layer(module: nn.Module, place: Place, gate: Gate) -> Undo:
    before, slots = type(module), dict(module._modules)
    bias = module._parameters.get("bias")
    values = None if bias is None else bias.detach().clone()
    if not isinstance(module, Gated):
        module.__class__ = _class_for(module)
        module.register_module("gate", None)
        module.register_module("mask", None)
    module._modules[_SLOT[place]] = gate
    if isinstance(gate, Centred):
        _fold(module, gate)

    def undo() -> None:
        module._modules.clear()
        module._modules.update(slots)
        module.__class__ = before
        module._parameters["bias"] = bias
        if bias is not None and values is not None:
            with torch.no_grad():
                bias.copy_(values)

    return undo


def _fold(module: nn.Module, gate: Centred) -> None:
    """b + W c: what the zeros of the gate stand for."""
    weight = module.get_parameter("weight")
    shift = gate.centre.to(weight.device) * matrix(module).float().sum(1)
    if module._parameters.get("bias") is None:
        zeros = torch.zeros_like(shift, dtype=weight.dtype)
        module.register_parameter("bias", nn.Parameter(zeros, requires_grad=False))
    bias = module.get_parameter("bias")
    with torch.inference_mode(bias.is_inference()), torch.no_grad():
        bias.copy_((bias.float() + shift).to(bias.dtype))


def _put_activation(model: nn.Module, name: str, gate: Gate) -> Undo:
    parent, _, last = name.rpartition(".")
    home, module = model.get_submodule(parent), model.get_submodule(name)
    act = module.act if isinstance(module, GatedActivation) else module
    replaced = GatedActivation(act, gate)
    replaced.training = module.training
    home._modules[last] = replaced

    def undo() -> None:
        home._modules[last] = module

    return undo


def matrix(module: nn.Module) -> torch.Tensor:
    """The weight as [N, K]; Conv1D holds [K, N]."""
    weight = module.get_parameter("weight").detach()
    return weight.t() if hasattr(module, "nf") else weight


def shape_of(module: nn.Module) -> tuple[int, int]:
    n, k = matrix(module).shape
    return n, k


def _class_for(module: nn.Module) -> type[nn.Module]:
    if type(module) is nn.Linear:
        return GatedLinear
    if type(module) is QuantizedInputLinear:
        return GatedQuantizedLinear
    from sparsec.passes.gates import conv1d  # it imports transformers

    return conv1d.GatedQuantizedConv1D if isinstance(module, QuantizesInput) else conv1d.GatedConv1D


def gates_of(model: nn.Module) -> Iterator[tuple[str, Place, Gate]]:
    """Every gate of a model with the module it stands at, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, Gated):
            for place in ("input", "output"):
                gate = module._modules.get(_SLOT[place])
                if isinstance(gate, Gate):
                    yield name, place, gate  # type: ignore[misc]
        elif isinstance(module, GatedActivation):
            yield name, "activation", module.gate


def described(model: nn.Module) -> list[dict[str, Any]]:
    """JSON types that ``restored`` reads."""
    return [{"name": name, "place": place, "gate": gate.said} for name, place, gate in gates_of(model)]


def removed(model: nn.Module) -> None:
    """Take every gate out again. A bias that holds a shift keeps it."""
    for name, place, _ in list(gates_of(model)):
        module = model.get_submodule(name)
        if place == "activation":
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._modules[last] = module.get_submodule("act")
        elif isinstance(module, Gated):
            for slot in ("gate", "mask"):
                module._modules.pop(slot, None)
            module.__class__ = _plain(module)


def _plain(module: nn.Module) -> Any:
    return next(cls for cls in type(module).__mro__ if not issubclass(cls, Gated))


def restored(model: nn.Module, said: Iterable[Mapping[str, Any]]) -> Undo:
    """Put gates in as ``described`` told of them; their buffers are filled by loading a state dict after.

    Gives what undoes all of it. Raises ValueError, with nothing changed, where they do not fit.
    """
    undo: list[Undo] = []

    def back() -> None:
        for one in reversed(undo):
            one()

    try:
        for row in said:
            try:
                undo.append(put(model, row["name"], row["place"], made(row["gate"])))
            except AttributeError:
                raise ValueError(f"the model has no module {row['name']!r} to gate") from None
        linked(model)
    except BaseException:
        back()
        raise
    return back


def linked(model: nn.Module) -> None:
    """Gates that tell others what to zero find them by name. Raises ValueError where one is not there."""
    found = list(gates_of(model))
    inputs = {name: gate for name, place, gate in found if place == "input"}
    for _, _, gate in found:
        gate.link(inputs)


@contextmanager
def gated_tokens(model: nn.Module, tokens: str) -> Iterator[None]:
    """Inside, which tokens of each sequence are gated: ``all``, or ``last-half`` as TEAL's own evaluation has it.

    The first half is then a dense context. Raises ValueError for another word.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens is {tokens!r}, and must be one of {', '.join(TOKENS)}")
    gates = [gate for _, _, gate in gates_of(model)]
    before = [gate.tokens for gate in gates]
    try:
        for gate in gates:
            gate.tokens = tokens
        yield
    finally:
        for gate, said in zip(gates, before, strict=True):
            gate.tokens = said
