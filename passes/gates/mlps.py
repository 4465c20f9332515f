"""The MLPs of a model, found by the names of their linears and proven on one forward.

In: a model and a batch. Out: ``Mlp`` records: what writes neurons, which module activates them, what reads them. Names
propose; what is said of an activation holds for the values seen: a gated MLP's reader reads act(gate) * up, a plain
one's reads act(fc1), and a neuron is ``maskable`` where zeroing it before the activation gave the reader a zero.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec.errors import NonFinite
from sparsec.passes.gates.layers import Gated, matrix
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.structure.find import ATTENTIONS, FFNS, linears_of

_ROWS = 16  # tokens that are compared


@dataclass(frozen=True)
class Mlp:
    """``writers``: what the activation reads, then up where it is a layer of its own. ``act``: "" where the activation
    is no module. ``gated``: the reader reads act(gate) * up. ``neurons``: the in-features of ``reader``."""

    name: str
    writers: tuple[str, ...]
    reader: str
    act: str
    gated: bool
    maskable: bool
    neurons: int


@dataclass(frozen=True)
class Mlps:
    """``declined``: reader -> why its MLP is left alone."""

    found: tuple[Mlp, ...]
    declined: Mapping[str, str]


def queries_and_outputs(model: nn.Module) -> frozenset[str]:
    """Names of the query and the output linears of attentions."""
    found: set[str] = set()
    for name, module in model.named_modules():
        for query, _, _, output in ATTENTIONS:
            if linears_of(module, (query, output)):
                found |= {_join(name, query), _join(name, output)}
    return frozenset(found)


def find_mlps(model: nn.Module, batch: Mapping[str, Any], readers: Collection[str]) -> Mlps:
    """The MLPs whose reader is among ``readers``, in module order. ``batch``: keyword arguments of one forward.

    Raises NonFinite where a reader reads NaN or infinity.
    """
    proposed = list(_proposed(model, readers))
    with evaluating(model), torch.no_grad():
        seen = _Seen(model, proposed)
        seen.run(batch)
        found = {reader: seen.wired(owner, writers, reader) for owner, writers, reader in proposed}
        maskable = _maskable(model, proposed, batch, found)
    mlps, declined = [], {}
    for owner, writers, reader in proposed:
        wiring = found[reader]
        if isinstance(wiring, str):
            declined[reader] = wiring
            continue
        act, gated = wiring
        width = int(matrix(model.get_submodule(reader)).shape[1])
        mlps.append(Mlp(owner, writers, reader, act, gated, reader in maskable, width))
    return Mlps(tuple(mlps), declined)


def _proposed(model: nn.Module, readers: Collection[str]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    taken: set[str] = set()
    for name, module in model.named_modules():
        for writers, reader in FFNS:
            full = _join(name, reader)
            if full in readers and full not in taken and linears_of(module, (*writers, reader)):
                taken.add(full)
                yield name, tuple(_join(name, writer) for writer in writers), full


class _Seen:
    """A few rows of what the modules of some MLPs read and give; a module may run more than once."""

    def __init__(self, model: nn.Module, proposed: list[tuple[str, tuple[str, ...], str]]) -> None:
        self.model = model
        self.calls: dict[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.watched = {model.get_submodule(n) for _, writers, reader in proposed for n in (*writers, reader)}
        for owner, _, _ in proposed:
            self.watched |= {module for _, module in _bare(model, owner)}

    def run(self, batch: Mapping[str, Any]) -> None:
        def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], torch.Tensor) and isinstance(output, torch.Tensor):
                self.calls.setdefault(module, []).append((_few(args[0]), _few(output)))

        with ExitStack() as stack:
            for module in self.watched:
                stack.callback(module.register_forward_hook(see).remove)
            self.model(**batch)

    def wired(self, owner: str, writers: tuple[str, ...], reader: str) -> tuple[str, bool] | str:
        """(activation, gated), or why it is not known."""
        made = [self.calls.get(self.model.get_submodule(name), []) for name in writers]
        read = self.calls.get(self.model.get_submodule(reader), [])
        if not read or not all(made):
            return "it does not run on the calibration data"
        p = read[-1][0]
        if not bool(p.isfinite().all()):
            raise NonFinite(what="the inputs", name=repr(reader), where="")
        outs = [calls[-1][1] for calls in made]
        if len(outs) == 1 and outs[0].shape[-1] == 2 * p.shape[-1]:
            outs = list(outs[0].chunk(2, -1))
        for name, module in _bare(self.model, owner):
            for x, y in self.calls.get(module, []):
                if len(outs) == 1 and _same(x, outs[0]) and _same(y, p):
                    return name, False
                if len(outs) == 2 and _gates(x, y, outs, p):
                    return name, True
        if len(outs) == 1 and outs[0].shape == p.shape:
            return "", False  # the activation is a function: what the reader reads is all that can be gated
        return "its activation is no module of its own, or not all that is between its linears"


def _bare(model: nn.Module, owner: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules without parameters below ``owner``, the outer ones first."""
    for name, module in model.get_submodule(owner).named_modules():
        if name and not isinstance(module, Gated) and next(module.parameters(), None) is None:
            yield _join(owner, name), module


def _gates(x: torch.Tensor, y: torch.Tensor, outs: list[torch.Tensor], p: torch.Tensor) -> bool:
    """Whether one of ``outs`` is activated (x -> y) and multiplied with the other to give p."""
    return any(_same(x, one) and _same(y * other, p) for one, other in (outs, outs[::-1]))


def _few(x: torch.Tensor) -> torch.Tensor:
    return x.detach().reshape(-1, x.shape[-1])[:_ROWS].clone() if x.dim() else x.detach()


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    scale = float(b.abs().max()) if b.numel() else 0.0
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-2 * b.abs() + 1e-5 * scale).all())


def _maskable(
    model: nn.Module,
    proposed: list[tuple[str, tuple[str, ...], str]],
    batch: Mapping[str, Any],
    wired: Mapping[str, Any],
) -> set[str]:
    """Readers that read zeros where what the activation reads is zeroed: act(0) is 0."""
    read: dict[str, torch.Tensor] = {}

    def hide(_: nn.Module, args: Any, y: torch.Tensor) -> torch.Tensor:
        return y * (torch.arange(y.shape[-1], device=y.device) % 2)

    def look(reader: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            read[reader] = _few(args[0])

        return see

    separate = []
    with ExitStack() as stack:
        for _, writers, reader in proposed:
            width = matrix(model.get_submodule(reader)).shape[1]
            if isinstance(wired[reader], str) or matrix(model.get_submodule(writers[0])).shape[0] != width:
                continue
            separate.append(reader)
            stack.callback(model.get_submodule(writers[0]).register_forward_hook(hide).remove)
            stack.callback(model.get_submodule(reader).register_forward_pre_hook(look(reader)).remove)
        if separate:
            model(**batch)
    return {n for n in separate if not bool(read[n][:, ::2].count_nonzero()) and bool(read[n][:, 1::2].any())}


def _join(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
