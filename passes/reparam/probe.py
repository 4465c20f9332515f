"""One run of a block, watched; then parts of it run again with other values in place of a layer's output.

In: a ``Block``. Out: what each layer and norm read and gave on the first batch (``Probe.calls``), and ``Probe.see``:
what a layer would read if others had given something else. Only hooks and arithmetic, so it holds for any module.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparsec.passes.reparam.fold import Edit, gain, matrix, written

if TYPE_CHECKING:
    from sparsec.passes.masks.block import Block

# A fold must leave the outputs within this share of what the block adds to its input; rounding is allowed on top.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@dataclass(frozen=True, eq=False)
class Call:
    """What a module was called with and what it gave; ``x`` and ``y`` are the first tensors of those."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    x: torch.Tensor
    y: torch.Tensor


class _Seen(Exception):
    """Ends a run at the layer whose input was asked for."""


class Probe:
    """The first batch of a block. ``layers``: local name -> module with a matrix; ``norms``: with a 1-D gain.

    ``calls``: in the order in which they ended. ``left_out``: layers that nothing may be folded into -> why.
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.batch = next(iter(block.batches()))
        self.modules: dict[str, nn.Module] = dict(block.module.named_modules())
        self.layers = {name: m for name, m in self.modules.items() if matrix(m) is not None}
        self.norms = {name: m for name, m in self.modules.items() if gain(m) is not None}
        self.calls: dict[str, Call] = {}
        counts = self._watch()
        self.left_out = self._left_out(counts)

    def _watch(self) -> dict[str, int]:
        counts = dict.fromkeys(self.modules, 0)
        with ExitStack() as stack, torch.no_grad():
            for name, module in self.modules.items():

                def see(
                    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, name: str = name
                ) -> None:
                    counts[name] += 1
                    x, y = _tensor([*args, *kwargs.values()]), _tensor([output])
                    if counts[name] == 1 and x is not None and y is not None:
                        self.calls[name] = Call(args, kwargs, x, y)

                stack.callback(module.register_forward_hook(see, with_kwargs=True).remove)
            self.out = self.block.run(self.batch).detach()
        return counts

    def _left_out(self, counts: Mapping[str, int]) -> dict[str, str]:
        owners: dict[int, list[str]] = {}
        for name in self.layers:
            owners.setdefault(id(self.layers[name]._parameters["weight"]), []).append(name)
        why = {name: "shares its weight with another layer" for names in owners.values() if names[1:] for name in names}
        for name in self.layers:
            if counts[name] != 1:
                said = "was not called" if not counts[name] else f"was called {counts[name]} times"
                why[name] = f"{said} on the first batch, so what feeds it is not known"
        return why

    def name(self, layer: str) -> str:
        """A layer's name as the whole model has it."""
        return f"{self.block.name}.{layer}" if self.block.name else layer

    def holds(self, edits: Sequence[Edit]) -> bool:
        """Whether the block's outputs on the first batch are what they were with the edits in place."""
        with written(self.modules, edits):
            return self.unchanged()

    def unchanged(self) -> bool:
        """Whether the block gives now what it gave when it was first run."""
        with torch.no_grad():
            now = self.block.run(self.batch)
        old, x = self.out.double(), self.batch.hidden
        added = old - x.double() if x.shape == old.shape else old
        allowed = TOLERANCE[now.dtype] * added.norm() + 4 * torch.finfo(now.dtype).eps * old.norm()
        return bool((now.double() - old).norm() <= allowed)

    def see(self, consumer: str, given: Mapping[str, torch.Tensor], among: Sequence[str]) -> torch.Tensor:
        """What ``consumer`` reads, fp32 [tokens, K], where the layers of ``given`` put out these tensors instead.

        Runs the smallest module around ``among`` and the consumer.
        """
        around = self._around([consumer, *among])
        seen: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].detach())
            raise _Seen

        with ExitStack() as stack, torch.no_grad():
            for name, value in given.items():

                def put(*_: Any, value: torch.Tensor = value) -> torch.Tensor:
                    return value

                stack.callback(self.layers[name].register_forward_hook(put).remove)
            stack.callback(self.layers[consumer].register_forward_pre_hook(stop).remove)
            try:
                call = self.calls[around]
                self.modules[around](*call.args, **call.kwargs)
            except _Seen:
                pass
        return seen[0].reshape(-1, seen[0].shape[-1]).float()

    def _around(self, names: Sequence[str]) -> str:
        """The smallest module that holds all of these and was itself called."""
        parts = [name.split(".")[:-1] for name in names]
        shared = []
        for step in zip(*parts, strict=False):
            if len(set(step)) > 1:
                break
            shared.append(step[0])
        while ".".join(shared) not in self.calls:
            shared.pop()
        return ".".join(shared)


def _tensor(values: Sequence[Any]) -> torch.Tensor | None:
    """The first tensor among values that may be tuples or dicts."""
    for value in values:
        if isinstance(value, torch.Tensor):
            return value.detach()
        inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
        found = _tensor(list(inside))
        if found is not None:
            return found
    return None
