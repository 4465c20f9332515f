"""EBFT: the kept weights of a block are trained until it gives what the dense block gave."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from sparsec.passes.masks.block import Batch, Block
from sparsec.passes.masks.post.layers import owners
from sparsec.passes.masks.scaled import loss_scale, scaled_gradients

_WINDOW = 8  # batches are drawn in random order among so many: all of them may not fit in memory
_HELD_OUT = 4  # one of so many batches judges and is not trained on


@dataclass(frozen=True)
class Ebft:
    """Train a block's kept weights on its dense outputs (EBFT).

    min over W, mask fixed, of ||block(x; W * mask) - dense block's output||^2 with Adam, one block after the other; x
    is what the compressed blocks before give. Source: Guo et al., "EBFT: Effective and Block-Wise Fine-Tuning for
    Sparse LLMs", 2024, arXiv 2402.12419; 10 epochs, learning rate 2e-4 (README of its code), betas 0.9 and 0.95.

    Other than the reference code: only the masked weights are trained, not norms and biases; no weight decay, clipping
    or linear decay; steps are taken on fp32 copies. One of four batches is held out: when an epoch does not lower the
    error on these, the epoch before it is put back and the block is done, so it is never worse on them than it was.
    With less than four batches all of them train and judge. The loss is divided by its first value, since Adam's
    epsilon would swallow the gradients of a small one.
    """

    role: ClassVar[str] = "post"
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    moves_masks: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    trains: ClassVar[bool] = True
    source: ClassVar[str] = "Guo et al., 2024"
    cost: ClassVar[str] = "minutes to hours; training, block by block"

    epochs: Annotated[int, Field(ge=1)] = field(default=10, metadata={"doc": "at most so many passes over the data"})
    lr: Annotated[float, Field(gt=0)] = field(default=2e-4, metadata={"doc": "learning rate of Adam"})

    def refine(self, block: Block) -> None:
        """Train the block's masked layers; the same seed gives the same bits."""
        weights = _weights(block)
        held_out = range(_HELD_OUT - 1, sum(1 for _ in block.targets()), _HELD_OUT)
        first = _error(block, held_out)
        if weights and 0 < first < math.inf:
            with _training(block.module, [w.parameter for w in weights]):
                self._train(block, weights, held_out, first)

    def _train(self, block: Block, weights: Sequence[_Weight], held_out: Collection[int], first: float) -> None:
        optimizer = torch.optim.Adam([w.master for w in weights], self.lr, betas=(0.9, 0.95))
        generator = torch.Generator().manual_seed(block.seed)
        best, kept = first, [w.parameter.detach().clone() for w in weights]
        for _ in range(self.epochs):
            for batch, target in _drawn(block, held_out, generator):
                _step(block, batch, target, weights, optimizer, first)
            now = _error(block, held_out)
            if not now < best:
                break
            best, kept = now, [w.parameter.detach().clone() for w in weights]
        with torch.no_grad():
            for w, values in zip(weights, kept, strict=True):
                w.parameter.copy_(values)


@dataclass(frozen=True, eq=False)
class _Weight:
    """A parameter, what is trained (an fp32 copy, or the fp32 parameter itself), and what stays zero; of one shape."""

    parameter: nn.Parameter
    master: torch.Tensor
    pruned: torch.Tensor


def _weights(block: Block) -> list[_Weight]:
    found = []
    for layer, name in owners(block.module, block.layers):
        assert layer.keep is not None
        parameter = block.module.get_submodule(name).get_parameter("weight")
        pruned = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=torch.bool, device=parameter.device
        )  # laid out like the parameter, so that its view as a matrix is that of the layer
        pruned.as_strided(layer.weight.shape, layer.weight.stride()).copy_(~layer.keep)
        master = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
        found.append(_Weight(parameter, master, pruned))
    return found


def _step(
    block: Block,
    batch: Batch,
    target: torch.Tensor,
    weights: Sequence[_Weight],
    optimizer: torch.optim.Optimizer,
    scale: float,
) -> None:
    parameters = [w.parameter for w in weights]
    with torch.enable_grad():
        grads, times = scaled_gradients(
            lambda: _mse(block.run(batch), target) / scale, parameters, loss_scale(parameters, target.numel())
        )
    if all(grad is None for grad in grads):  # experts that this batch does not reach
        return
    for w, grad in zip(weights, grads, strict=True):
        w.master.grad = None if grad is None else (grad.to(w.master.dtype) / times).masked_fill(w.pruned, 0.0)
    optimizer.step()
    with torch.no_grad():
        for w in weights:
            w.parameter.copy_(w.master)


def _drawn(block: Block, held_out: Collection[int], generator: torch.Generator) -> Iterator[tuple[Batch, torch.Tensor]]:
    """The batches that train, with their targets, in random order within windows."""
    pairs = zip(block.batches(), block.targets(), strict=True)
    rest = (pair for i, pair in enumerate(pairs) if i not in held_out)
    while window := list(islice(rest, _WINDOW)):
        for i in torch.randperm(len(window), generator=generator).tolist():
            yield window[i]


def _error(block: Block, held_out: Collection[int]) -> float:
    """The mean squared error over the batches held out, over all where none is; NaN where there are no batches."""
    errors = []
    with torch.no_grad():
        for i, (batch, target) in enumerate(zip(block.batches(), block.targets(), strict=True)):
            if not held_out or i in held_out:
                errors.append(float(_mse(block.run(batch), target)))
    return sum(errors) / len(errors) if errors else math.nan


def _mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.float() - target.to(output.device).float()).square().mean()


@contextmanager
def _training(module: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """With gradients for these parameters of the module and no others; afterwards as it was."""
    flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    module.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
