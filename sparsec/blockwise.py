"""A model block by block: calibration batches in, each block with what enters it out, while earlier ones are changed.

A block is one entry of the model's list of layers. One forward of the untouched model records what every block is
called with; from then on blocks are run alone, in order: whoever walks collects statistics, writes the block's
weights, and goes on, and the next block's inputs are computed by the changed block (``propagate_error``) or by the
untouched one. Plain forward hooks, no tracing. Activations stay in memory up to a budget, then go to disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from sparsec.collecting import collect, given, marked
from sparsec.errors import BadRecipe
from sparsec.passes.masks.block import Batch, LayerState
from sparsec.spill import Spilled

Data = Sequence[Mapping[str, Any]]  # one dict of keyword arguments of the model's forward for each batch


@dataclass(frozen=True)
class Found:
    """The list of layers of a model: (name, module) in the order in which they run; () where there is none."""

    blocks: tuple[tuple[str, nn.Module], ...]
    note: str = ""


def find_blocks(model: nn.Module, layers: Sequence[str], said: str | None = None) -> Found:
    """The module list whose entries hold most of ``layers`` (names); ``said`` names one. Raises BadRecipe for a name
    that is no list of modules."""
    modules = dict(model.named_modules())
    if said is not None:
        if not isinstance(modules.get(said), (nn.ModuleList, nn.Sequential)):
            lists = [name for name, m in modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential))]
            known = ", ".join(filter(None, lists[:5])) or "none"
            raise BadRecipe(
                detail=f"blocks is {said!r}, but that is no list of modules; the model's lists are: {known}"
            )
        return Found(_entries(said, modules[said]))
    best: tuple[int, int, str] | None = None
    for name, module in modules.items():
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        inside = [_below(name, layer) for layer in layers]
        entries = {part.partition(".")[0] for part in inside if part is not None}
        if not entries or (len(entries) == 1 and len(list(module.children())) > 1 and name.count(".") > 0):
            continue
        rank = (sum(part is not None for part in inside), len(entries), name)
        if best is None or rank[:2] > best[:2]:
            best = rank
    if best is None:
        return Found((), "the model has no list of blocks: it is compressed as one")
    return Found(_entries(best[2], modules[best[2]]))


def _below(name: str, layer: str) -> str | None:
    """``layer`` as seen from module ``name``, or None where it is not inside."""
    if not name:
        return layer
    return layer[len(name) + 1 :] if layer.startswith(f"{name}.") else None


def _entries(name: str, module: nn.Module) -> tuple[tuple[str, nn.Module], ...]:
    return tuple((f"{name}.{key}" if name else key, child) for key, child in module.named_children())


@dataclass
class BlockRun:
    """One block with its calibration data; the ``Block`` of ``sparsec.passes.masks.block``.

    ``masks``: of each batch the positions that are no padding, None where all count; () where no batch has any.
    """

    name: str
    module: nn.Module
    seed: int
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each batch: the arguments beside the hidden states
    inputs: Spilled
    dense: Spilled | None = None
    layers: list[LayerState] = field(default_factory=list)
    masks: Sequence[torch.Tensor | None] = ()
    held: Set[tuple[str, str]] = frozenset()

    def batches(self) -> Iterator[Batch]:
        for i, (args, kwargs) in enumerate(self.calls):
            yield Batch(self.inputs[i], args, kwargs)

    def targets(self) -> Iterator[torch.Tensor]:
        if self.dense is None:
            raise RuntimeError("this walk keeps no outputs of dense blocks")
        for i in range(len(self.calls)):
            yield self.dense[i]

    def run(self, batch: Batch) -> torch.Tensor:
        return first_tensor(self.module(batch.hidden, *batch.args, **(batch.kwargs or {})))

    def outputs(self) -> Iterator[torch.Tensor]:
        """The block's outputs now, batch by batch."""
        with torch.no_grad():
            for batch in self.batches():
                yield self.run(batch)

    def collect(self, modules: Mapping[str, nn.Module], needs: Sequence[str]) -> dict[str, dict[str, torch.Tensor]]:
        """Statistics of the inputs of ``modules`` (name -> module of this block) over all batches."""

        mask: torch.Tensor | None = None

        def forward() -> None:
            nonlocal mask
            for i, batch in enumerate(self.batches()):
                mask = self.masks[i] if self.masks else None
                self.run(batch)

        return collect(modules, needs, forward, lambda: mask)

    def groups(self, modules: Mapping[str, nn.Module]) -> list[list[str]]:
        """The names in the order in which the modules run; those that read one and the same input together."""
        order: list[tuple[str, torch.Tensor]] = []
        with ExitStack() as stack, torch.no_grad():
            for name, module in modules.items():

                def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], name: str = name) -> None:
                    if all(name != seen for seen, _ in order):
                        order.append((name, given(args, kwargs)))

                stack.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
            kept = next(iter(self.batches()))
            self.run(kept)
        grouped: list[list[str]] = []
        last = None
        for name, source in order:
            if source is last:
                grouped[-1].append(name)
            else:
                grouped.append([name])
            last = source
        missed = [name for name in modules if all(name != seen for seen, _ in order)]
        return [*grouped, *([missed] if missed else [])]


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states of what a block returns: itself, or the first of a tuple."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if not isinstance(output, Mapping) else next(iter(output.values()))
    return output


def masks_of(data: Data) -> list[torch.Tensor | None]:
    """Of each batch the positions that are no padding; None where all of them count."""
    return [None if mask is None or bool(mask.all()) else mask for mask in map(marked, data)]


class WholeRun(BlockRun):
    """The model itself as a block: for layers outside the list of blocks, and for models without one."""

    def __init__(self, model: nn.Module, data: Data, memory: int, seed: int) -> None:
        self._first = next(iter(data[0])) if data else ""
        calls: list[Any] = [((), {k: v for k, v in sample.items() if k != self._first}) for sample in data]
        inputs = Spilled(memory, (sample[self._first] for sample in data))
        super().__init__("", model, seed, calls, inputs, masks=masks_of(data))

    def run(self, batch: Batch) -> torch.Tensor:
        return first_tensor(self.module(**{self._first: batch.hidden, **(batch.kwargs or {})}))


class _Reached(Exception):
    """The last block was reached, and what comes after it is not needed."""


class _Seen:
    """What one forward of the model calls its ``count`` blocks with. ``chained``: in order, each once, nothing between.

    ``plain``: whether blocks return a tensor and nothing else.
    """

    def __init__(self, count: int) -> None:
        self.first: torch.Tensor | None = None
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.plain = True
        self._count, self._gave = count, torch.empty(0)
        self._follow = True

    @property
    def chained(self) -> bool:
        return self._follow and len(self.calls) == self._count

    def enter(self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, args, kwargs = _hidden_first(module, args, kwargs)
        if self.first is None:
            self.first = hidden.detach()
        elif hidden is not self._gave and not torch.equal(hidden, self._gave):
            self._follow = False
        self._follow &= i == len(self.calls)
        self.calls.append((args, kwargs))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._gave = first_tensor(output)
        self.plain &= isinstance(output, torch.Tensor)


def _hidden_first(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """The hidden states that a block is called with, by position or by name, and its other arguments."""
    kwargs = dict(kwargs)
    if not args:
        args = (kwargs.pop(next(iter(inspect.signature(module.forward).parameters))),)
    return args[0], args[1:], kwargs


@contextmanager
def _handing_on(block: nn.Module, last: bool) -> Iterator[None]:
    """``block`` returns the hidden states that it gets; the last one ends the forward."""
    own = block.__dict__.get("forward")
    forward = block.forward

    @wraps(forward)  # its signature says what the first argument is called
    def hand_on(*args: Any, **kwargs: Any) -> torch.Tensor:
        if last:
            raise _Reached
        return args[0] if args else kwargs[next(iter(inspect.signature(forward).parameters))]  # type: ignore[no-any-return]

    block.forward = hand_on
    try:
        yield
    finally:
        del block.forward
        if own is not None:
            block.forward = own


def _same(a: Any, b: Any) -> bool:
    """Equal arguments; what is neither a tensor nor plain data must be the same object."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return a is b or (isinstance(a, (bool, int, float, str)) and a == b)


class Walk:
    """Iterate to get a ``BlockRun`` for each block; when the next is asked for, the outputs are computed.

    ``propagate_error``: whether a block's inputs come from the changed blocks before it. ``keep_dense``: whether
    ``targets`` will be asked for. ``memory``: bytes of activations kept in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        found: Found,
        data: Data,
        *,
        propagate_error: bool = True,
        keep_dense: bool = False,
        memory: int = 4 << 30,
        seed: int = 0,
    ) -> None:
        self.model, self.data, self.memory, self.seed = model, data, memory, seed
        self.propagate_error, self.keep_dense = propagate_error, keep_dense
        self.blocks = found.blocks
        self.notes: list[str] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._inputs = Spilled(memory)
        self._masks = masks_of(data)
        if self.blocks:
            self._capture()

    def _capture(self) -> None:
        """What enters the first block, and what else each block is called with, batch by batch.

        The first batch goes through the whole model, which shows whether each block gets what the one before gave.
        Then it goes through blocks that only hand on what they get. Where that changes nothing else that blocks are
        called with (masks and positions do not depend on hidden states), the other batches go that way.
        """
        self._calls = [[] for _ in self.blocks]
        skip = False
        for i, data in enumerate(self.data):
            seen = self._pass(data, skip)
            if not seen.chained:
                self.notes.append("blocks do not simply follow each other here: the model is compressed as one")
                self.blocks, self._calls, self._inputs = (), [], Spilled(self.memory)
                return
            if i == 0 and len(self.data) > 1 and seen.plain:
                again = self._pass(data, True)
                skip = again.chained and _same(again.calls, seen.calls)
            assert seen.first is not None
            self._inputs.append(seen.first)
            for calls, call in zip(self._calls, seen.calls, strict=True):
                calls.append(call)

    def _pass(self, data: Mapping[str, Any], skip: bool) -> _Seen:
        """One forward of the model; with ``skip`` blocks are not computed, and nothing after the last one is."""
        seen = _Seen(len(self.blocks))
        with ExitStack() as stack, torch.no_grad(), suppress(_Reached):
            for i, (_, block) in enumerate(self.blocks):
                if skip:
                    stack.enter_context(_handing_on(block, last=i == len(self.blocks) - 1))
                stack.callback(block.register_forward_pre_hook(partial(seen.enter, i), with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(seen.leave).remove)
            self.model(**data)
        return seen

    def __iter__(self) -> Iterator[BlockRun]:
        inputs = self._inputs
        for i, (name, module) in enumerate(self.blocks):
            run = BlockRun(name, module, self.seed, self._calls[i], inputs, masks=self._masks)
            if self.keep_dense or not self.propagate_error:
                run.dense = Spilled(self.memory, run.outputs())
            yield run
            last = i == len(self.blocks) - 1
            if not last:
                if self.propagate_error:
                    inputs = Spilled(self.memory, run.outputs())
                else:
                    assert run.dense is not None
                    inputs = run.dense
            self._calls[i] = []
