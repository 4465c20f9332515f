"""A model block by block: calibration batches in, each block with what enters it out, while earlier ones are changed.

A block is one entry of the model's list of layers. One forward of the untouched model records what every block is
called with; from then on blocks are run alone, in order: whoever walks collects statistics, writes the block's
weights, and goes on, and the next block's inputs are computed by the changed block (``propagate_error``) or by the
untouched one. Plain forward hooks, no tracing. Activations stay in memory up to a budget, then go to disk.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsec.errors import BadRecipe
from sparsec.passes.masks.block import Batch, LayerState
from sparsec.passes.masks.statistics import Collector
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
    """One block with its calibration data; the ``Block`` of ``sparsec.passes.masks.block``."""

    name: str
    module: nn.Module
    seed: int
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each batch: the arguments beside the hidden states
    inputs: Spilled
    dense: Spilled | None = None
    layers: list[LayerState] = field(default_factory=list)

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

        def forward() -> None:
            for _ in self.outputs():
                pass

        return collect(modules, needs, forward)

    def groups(self, modules: Mapping[str, nn.Module]) -> list[list[str]]:
        """The names in the order in which the modules run; those that read one and the same input together."""
        order: list[tuple[str, torch.Tensor]] = []
        with ExitStack() as stack, torch.no_grad():
            for name, module in modules.items():

                def see(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                    if all(name != seen for seen, _ in order):
                        order.append((name, args[0]))

                stack.callback(module.register_forward_pre_hook(see).remove)
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


def collect(
    modules: Mapping[str, nn.Module], needs: Sequence[str], forward: Callable[[], None]
) -> dict[str, dict[str, torch.Tensor]]:
    """Run ``forward`` with a hook on each module that reduces its inputs. A module that is never called gives zeros."""
    collectors = {name: Collector(_in_features(module), needs, name) for name, module in modules.items()}
    with ExitStack() as stack, torch.no_grad():
        for name, module in modules.items():

            def see(_: nn.Module, args: tuple[Any, ...], kind: nn.Module = module, name: str = name) -> None:
                collectors[name].add(_rows(kind, args[0]))

            stack.callback(module.register_forward_pre_hook(see).remove)
        forward()
    return {name: collector.result() for name, collector in collectors.items()}


def _in_features(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return int(weight.shape[0] if hasattr(module, "nf") else weight.shape[1])  # HF's Conv1D holds [K, N]


def _rows(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Inputs as [tokens, K]; of a 1x1 convolution every position it reads is a token."""
    x = x.detach()
    if isinstance(module, nn.Conv2d):
        (high, wide), x = module.stride, x if x.dim() == 4 else x.unsqueeze(0)
        x = x[:, :, ::high, ::wide].permute(0, 2, 3, 1)
    return x.reshape(-1, x.shape[-1])


def first_tensor(output: Any) -> torch.Tensor:
    """The hidden states of what a block returns: itself, or the first of a tuple."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if not isinstance(output, Mapping) else next(iter(output.values()))
    return output


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
        if self.blocks:
            self._capture()

    def _capture(self) -> None:
        """One forward of the model: what enters the first block, and what else each block is called with."""
        self._calls = [[] for _ in self.blocks]
        chained = True
        for data in self.data:
            seen: dict[int, torch.Tensor] = {}
            gave: dict[int, torch.Tensor] = {}
            with ExitStack() as stack, torch.no_grad():
                for i, (_, block) in enumerate(self.blocks):
                    stack.callback(block.register_forward_pre_hook(self._recorder(i, seen), with_kwargs=True).remove)

                    def out(_: nn.Module, __: Any, output: Any, i: int = i, gave: dict[int, Any] = gave) -> None:
                        gave[i] = first_tensor(output)

                    stack.callback(block.register_forward_hook(out).remove)
                self.model(**data)
            ran = [i in seen for i in range(len(self.blocks))]
            chained = (
                chained and all(ran) and all(torch.equal(gave[i], seen[i + 1]) for i in range(len(self.blocks) - 1))
            )
            if not chained:
                break
            self._inputs.append(seen[0])
        if not chained:
            self.notes.append("blocks do not simply follow each other here: the model is compressed as one")
            self.blocks, self._calls, self._inputs = (), [], Spilled(self.memory)

    def _recorder(self, i: int, seen: dict[int, torch.Tensor]) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            if not args:
                args = (kwargs.pop(next(iter(inspect.signature(module.forward).parameters))),)
            seen[i] = args[0].detach()
            self._calls[i].append((args[1:], kwargs))

        return record

    def __iter__(self) -> Iterator[BlockRun]:
        inputs = self._inputs
        for i, (name, module) in enumerate(self.blocks):
            run = BlockRun(name, module, self.seed, self._calls[i], inputs)
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
