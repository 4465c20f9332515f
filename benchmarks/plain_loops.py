"""What a user would write by hand: pruning loops in plain PyTorch, and the column-by-column OBS solver.

They are what ``benchmarks.sparsify_speed`` measures sparsec against, written from the formulas of the papers and in the
shape that public reference code has: the first block's inputs are caught, each block runs once with hooks that add up
statistics and once for its outputs. Quotas are exact here as they are in sparsec, so that masks can be compared.
Sources: Sun et al., 2023 (Wanda), equation 1; Frantar & Alistarh, 2023 (SparseGPT), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

WIDTH = 128  # columns of a block
DAMP = 0.01
Prune = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # weight, statistics, sparsity -> new weight
Add = Callable[[torch.Tensor, torch.Tensor], None]  # statistics, inputs [tokens, K]


class _Caught(Exception):
    """The first block was reached."""


class _Catcher(nn.Module):
    """Stands in for the first block and keeps what it is called with."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.inputs: list[torch.Tensor] = []
        self.kwargs: dict[str, Any] = {}

    def forward(self, hidden: torch.Tensor, **kwargs: Any) -> None:
        self.inputs.append(hidden)
        self.kwargs = kwargs  # samples of one length: the same for all
        raise _Caught


def _catch(model: nn.Module, blocks: nn.ModuleList, samples: Sequence[torch.Tensor]) -> _Catcher:
    catcher = _Catcher(blocks[0])
    blocks[0] = catcher
    for sample in samples:
        with suppress(_Caught):
            model(input_ids=sample, use_cache=False)
    blocks[0] = catcher.block
    return catcher


@torch.no_grad()
def prune_loop(
    model: nn.Module,
    blocks: nn.ModuleList,
    samples: Sequence[torch.Tensor],
    sparsity: float,
    made: Callable[[int], torch.Tensor],
    add: Add,
    prune: Prune,
) -> None:
    """Prune every Linear of ``blocks`` in place. ``made(K)``: empty statistics of a layer; ``add``; ``prune``."""
    caught = _catch(model, blocks, samples)
    inputs = caught.inputs
    for block in blocks:
        layers = [module for module in block.modules() if isinstance(module, nn.Linear)]
        stats = {layer: made(layer.in_features) for layer in layers}

        def hook(layer: nn.Module, args: Any, _: Any, stats: Mapping[Any, torch.Tensor] = stats) -> None:
            add(stats[layer], args[0].reshape(-1, args[0].shape[-1]))

        handles = [layer.register_forward_hook(hook) for layer in layers]
        for hidden in inputs:
            block(hidden, **caught.kwargs)
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.weight.copy_(prune(layer.weight.float(), stats.pop(layer), sparsity))
        for i, hidden in enumerate(inputs):
            inputs[i] = _first(block(hidden, **caught.kwargs))


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def wanda(model: nn.Module, blocks: nn.ModuleList, samples: Sequence[torch.Tensor], sparsity: float) -> None:
    """Wanda by the plain loop: |W| ||X||, the same number from each row."""
    prune_loop(model, blocks, samples, sparsity, torch.zeros, add_squares, prune_wanda)


def sparsegpt(model: nn.Module, blocks: nn.ModuleList, samples: Sequence[torch.Tensor], sparsity: float) -> None:
    """SparseGPT by the plain loop: X X^T of each layer, then the blocked sweep over its columns."""
    prune_loop(model, blocks, samples, sparsity, lambda k: torch.zeros(k, k), add_products, prune_blocked)


def add_squares(total: torch.Tensor, x: torch.Tensor) -> None:
    total += torch.linalg.vector_norm(x.float(), dim=0).square()


def add_products(total: torch.Tensor, x: torch.Tensor) -> None:
    x = x.float()
    total += x.t() @ x


def prune_wanda(weight: torch.Tensor, squares: torch.Tensor, sparsity: float) -> torch.Tensor:
    score = weight.abs() * squares.sqrt()
    order = torch.sort(score, dim=1, stable=True).indices[:, : _quota(weight.shape[1], sparsity)]
    keep = torch.ones_like(weight, dtype=torch.bool).scatter_(1, order, False)
    return weight * keep


def _quota(size: int, sparsity: float) -> int:
    return math.floor(size * sparsity + 0.5)


def factor_of(xxt: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The upper Cholesky factor of H^-1, H = X X^T + damp; weights of dead inputs are zeroed in place."""
    hessian = xxt.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMP * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    return upper


def prune_blocked(weight: torch.Tensor, xxt: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Algorithm 1: masks and updates block by block; errors reach the columns behind a block in one product."""
    weight = weight.clone()
    upper = factor_of(xxt, weight)
    for start in range(0, weight.shape[1], WIDTH):
        end = min(start + WIDTH, weight.shape[1])
        block = weight[:, start:end].clone()
        errors = torch.zeros_like(block)
        inner = upper[start:end, start:end]
        keep = _lowest_gone(block, inner.diagonal(), sparsity)
        for j in range(end - start):
            column = block[:, j]
            new = column * keep[:, j]
            error = (column - new) / inner[j, j]
            block[:, j:] -= error[:, None] * inner[j, j:]
            block[:, j] = new
            errors[:, j] = error
        weight[:, start:end] = block
        weight[:, end:] -= errors @ upper[start:end, end:]
    return weight


def prune_by_column(weight: torch.Tensor, xxt: torch.Tensor, sparsity: float) -> torch.Tensor:
    """The same sums, straightforwardly: every column's error is taken from all columns to come before the next one."""
    weight = weight.clone()
    upper = factor_of(xxt, weight)
    keep = torch.ones_like(weight, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if j % WIDTH == 0:
            block = weight[:, j : j + WIDTH]
            keep[:, j : j + WIDTH] = _lowest_gone(block, upper.diagonal()[j : j + WIDTH], sparsity)
        new = weight[:, j] * keep[:, j]
        error = (weight[:, j] - new) / upper[j, j]
        weight[:, j:] -= error[:, None] * upper[j, j:]
        weight[:, j] = new
    return weight


def _lowest_gone(block: torch.Tensor, pivots: torch.Tensor, sparsity: float) -> torch.Tensor:
    score = (block / pivots).square()
    order = torch.sort(score.flatten(), stable=True).indices[: _quota(score.numel(), sparsity)]
    keep = torch.ones(score.numel(), dtype=torch.bool)
    keep[order] = False
    return keep.view_as(score)
