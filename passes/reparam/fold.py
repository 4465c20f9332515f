"""Edits: permutations and scales of the in- or out-features of layers, written into weights and taken back exactly.

A rewrite is a list of ``Edit``: a consumer's columns one way, what feeds it the other way. ``written`` tries a list on
the modules alone; ``settle`` brings the ``LayerState`` of each layer up to date once a list stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from sparsec.passes.masks.block import LayerState
from sparsec.passes.reparam.contract import Side, permuted, scaled


@dataclass(frozen=True, eq=False)
class Edit:
    """One layer, one side. ``order`` (int64): feature j becomes what ``order[j]`` was. ``scale`` (fp32, positive):
    columns are multiplied by it (``in``), rows and biases divided (``out``). ``offset``: a norm's gain is offset + w.
    """

    layer: str
    side: Side
    order: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    offset: float = 0.0


def matrix(module: nn.Module) -> torch.Tensor | None:
    """The weight [N, K] as a detached view, or None where the module holds none that can be rewritten."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta or weight.dim() != 2:
        return None
    if isinstance(module, nn.Linear):
        return weight.detach()
    is_hf = any(c.__name__ == "Conv1D" and c.__module__.startswith("transformers") for c in type(module).__mro__)
    return weight.detach().t() if is_hf else None


def gain(module: nn.Module) -> torch.Tensor | None:
    """The 1-D weight of what may be a norm: a module whose own parameters are ``weight`` and perhaps ``bias``."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight = own.get("weight")
    if weight is None or type(weight) is not nn.Parameter or weight.dim() != 1 or set(own) - {"weight", "bias"}:
        return None
    return weight.detach() if weight.is_floating_point() and not weight.is_meta else None


def write(module: nn.Module, edit: Edit) -> None:
    """Apply one edit to a layer or a norm, in fp32, rounded once to the parameter's dtype."""
    weight = matrix(module)
    bias = module._parameters.get("bias")
    with torch.no_grad():
        if weight is None:
            assert edit.scale is not None
            norm = module._parameters["weight"]
            assert norm is not None
            norm.copy_((norm.float() + edit.offset) / edit.scale - edit.offset)
        else:
            weight.copy_(_edited(weight, edit))
        if bias is not None and edit.side == "out":
            bias.copy_(_edited(bias.detach(), edit))


def _edited(values: torch.Tensor, edit: Edit) -> torch.Tensor:
    """A copy of [N, K] or [N] values, fp32, with the edit in it."""
    new = values.float()
    axis = 1 if edit.side == "in" else 0
    if edit.order is not None:
        new = new.index_select(axis, edit.order.to(new.device))
    if edit.scale is not None:
        scale = edit.scale.to(new)
        new = new * scale if edit.side == "in" else new / (scale[:, None] if new.dim() == 2 else scale)
    return new


@contextmanager
def written(modules: Mapping[str, nn.Module], edits: Iterable[Edit]) -> Iterator[Keep]:
    """The modules with the edits in them; on leaving they get their very bits back unless ``keep()`` was called."""
    edits = list(edits)
    parameters = {id(p): p for e in edits for p in modules[e.layer]._parameters.values() if p is not None}
    before = {key: p.detach().clone() for key, p in parameters.items()}
    keep = Keep()
    try:
        for edit in edits:
            write(modules[edit.layer], edit)
        yield keep
    finally:
        if not keep.called:
            with torch.no_grad():
                for key, parameter in parameters.items():
                    parameter.copy_(before[key])


class Keep:
    """Call it inside ``written`` to let the edits stay."""

    def __init__(self) -> None:
        self.called = False

    def __call__(self) -> None:
        self.called = True


def settle(states: Mapping[str, LayerState], edits: Iterable[Edit]) -> None:
    """Bring ``dense`` and ``stats`` of the edited layers to what they would be had the weights always been so."""
    for edit in edits:
        state = states.get(edit.layer)
        if state is None:
            continue
        state.dense = _edited(state.dense, edit)
        if edit.order is not None:
            state.stats = permuted(state.stats, edit.order, edit.side)
        if edit.scale is not None:
            state.stats = scaled(state.stats, edit.scale, edit.side)
