"""BESA: sparsities learned from the output error of the block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field

from sparsec.errors import UnprunableLayer
from sparsec.passes.masks.allocate.spread import HIGH, Judge, counts_of, importance, shift_to_mean
from sparsec.passes.masks.scaled import loss_scale, scaled_gradients

if TYPE_CHECKING:
    from torch import nn

    from sparsec.passes.masks.block import Block, LayerState

CANDIDATES = 100  # 0, 1 %, ..., 100 %


@dataclass(frozen=True)
class BESA:
    """Learn how sparse each layer or row of a block is from the block's error.

    Scores fix the order in which the weights of a row go. Each layer (or row) has logits l over the candidates
    p_d = d / 100; with b = softmax(l) its sparsity is a = sum_d b_d p_d, and a weight of which a share r of its row is
    less important is pruned with probability sum over p_d > r of b_d. Forward, the a K least important of each row are
    pruned; backward, the gradient goes through the probabilities (straight-through). Loss of a batch:
    mean over columns of ||dense - pruned||^2 / ||dense||^2 + penalty * ((block sparsity - S) / S)^2.
    Source: Xu et al., "BESA: Pruning Large Language Models with Blockwise Parameter-Efficient Sparsity Allocation",
    2024, equations 3 to 8.

    The reference code squashes the logits by a sigmoid first and starts from a = 0.5; softmax of values in (0, 1)
    cannot leave about 0.38 to 0.62, so here it is the paper's softmax, started at a = S by l_d = c p_d. It steps by
    Prodigy or AdamW with lr 0.01; here it is Adam. Its penalty is 1, and 5 for rows in its README. It accepts
    what it lands on; here the result is moved to S exactly and to whole numbers of weights, and nothing goes over 0.99.
    """

    per: Literal["row", "layer"] = field(default="row", metadata={"doc": "one sparsity a row, or one a layer"})
    epochs: Annotated[int, Field(ge=1)] = field(default=1, metadata={"doc": "passes over the calibration data"})
    lr: Annotated[float, Field(gt=0)] = field(default=0.01, metadata={"doc": "Adam's step size for the logits"})
    penalty: Annotated[float, Field(ge=0)] = field(
        default=5.0, metadata={"doc": "weight of the block's relative miss of the sparsity, squared"}
    )
    judge: Judge = field(default="wanda", metadata={"doc": "what orders the weights of a row: wanda or magnitude"})

    role: ClassVar[str] = "allocate"
    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    keeps: ClassVar[str] = "mean"
    source: ClassVar[str] = "Xu et al., 2024 (BESA)"
    cost: ClassVar[str] = "a forward and a backward of each block a batch"

    def learn(self, block: Block, sparsity: float) -> Mapping[str, float | torch.Tensor]:
        """Layer name -> its sparsity, or fp64 [N] for its rows; block-wide round(sparsity * weights) go, exactly."""
        layers = [_Layer(state, self.per == "row", importance(self.judge, state.dense, state.stats), sparsity)
                  for state in block.layers]  # fmt: skip
        if sparsity > 0:
            with _trainable(block.module, layers), torch.enable_grad():
                self._train(block, layers, sparsity)
        shares = torch.cat([layer.shares().detach() for layer in layers])
        sizes = torch.cat([layer.sizes for layer in layers])
        counts = counts_of(shift_to_mean(shares, sizes, sparsity, 0.0, HIGH), sizes, sparsity)
        learned = torch.split(counts.double() / sizes, [len(layer.sizes) for layer in layers])
        return {
            layer.state.name: found if self.per == "row" else float(found)
            for layer, found in zip(layers, learned, strict=True)
        }

    def _train(self, block: Block, layers: Sequence[_Layer], sparsity: float) -> None:
        optimizer = torch.optim.Adam([layer.logits for layer in layers], lr=self.lr)
        sizes = torch.cat([layer.sizes for layer in layers])
        owners = [layer.owner for layer in layers]
        for _ in range(self.epochs):
            for batch, target in zip(block.batches(), block.targets(), strict=True):
                kept = [layer.prune() for layer in layers]  # writes the weights; holds what they depend on
                gradients, scale = scaled_gradients(
                    lambda b=batch, t=target: _error(block.run(b), t),  # type: ignore[misc]
                    owners,
                    loss_scale(owners, target.numel()),
                )
                if all(gradient is None for gradient in gradients):  # experts that this batch does not reach
                    continue
                shares = torch.cat([layer.shares() for layer in layers])
                missed = (shares @ sizes / sizes.sum() - sparsity) / sparsity
                optimizer.zero_grad()
                torch.autograd.backward(
                    [self.penalty * missed.square(), *kept],
                    [None, *(layer.pull(g) / scale for layer, g in zip(layers, gradients, strict=True))],
                )
                optimizer.step()


class _Layer:
    """One layer while it is learned. ``logits`` [N or 1, 101], ``sizes`` [N or 1] weights that each decides for."""

    def __init__(self, state: LayerState, rows: bool, score: torch.Tensor, sparsity: float) -> None:
        n, k = score.shape
        device = score.device
        self.state = state
        self.owner: nn.Parameter
        order = score.sort(dim=1, descending=True, stable=True).indices  # as ``select`` breaks ties
        places = torch.arange(k - 1, -1, -1, device=device, dtype=torch.int32).expand(n, k)
        self.rank = torch.empty(n, k, dtype=torch.int32, device=device).scatter_(1, order, places)
        self.candidates = torch.linspace(0, 1, CANDIDATES + 1, dtype=torch.float64, device=device)
        decides = (n, k) if rows else (1, n * k)
        self.sizes = torch.full((decides[0],), decides[1], dtype=torch.float64, device=device)
        start = _tilt(sparsity) * self.candidates
        self.logits = start.float().repeat(decides[0], 1).requires_grad_()

    def shares(self) -> torch.Tensor:
        """Sparsities [N or 1] fp64, differentiable."""
        return self.logits.double().softmax(1) @ self.candidates

    def prune(self) -> torch.Tensor:
        """Write the pruned weight into the model. Gives the probabilities to stay, [N or 1, 100], differentiable.

        Column j is that of the weights with a share of j/100 to (j+1)/100 of their row below them.
        """
        k = self.rank.shape[1]
        goes = (self.shares().detach() * k + 0.5).floor()
        with torch.no_grad():
            self.state.weight.copy_(self.state.dense * (self.rank >= goes[:, None]))
        return self.logits.softmax(1).cumsum(1)[:, :-1]

    def pull(self, gradient: torch.Tensor | None) -> torch.Tensor:
        """The gradient [N or 1, 100] of the probabilities to stay, from that of the parameter."""
        n, k = self.rank.shape
        sums = torch.zeros(n, CANDIDATES, device=self.rank.device)
        if gradient is not None:
            by_weight = _seen_as(self.state.weight, self.owner, gradient).float() * self.state.dense
            sums.scatter_add_(1, self.rank.long() * CANDIDATES // k, by_weight)
        return sums if len(self.sizes) == n else sums.sum(0, keepdim=True)


def _tilt(sparsity: float) -> float:
    """The c for which softmax(c p) over the candidates has the mean ``sparsity``."""
    candidates = torch.linspace(0, 1, CANDIDATES + 1, dtype=torch.float64)
    low, high = -1e4, 1e4
    while low < (middle := (low + high) / 2) < high:
        below = float((middle * candidates).softmax(0) @ candidates) < sparsity
        low, high = (middle, high) if below else (low, middle)
    return high


def _error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over the columns of the squared relative error of each."""
    output, target = (t.float().reshape(-1, t.shape[-1]) for t in (output, target))
    scale = target.square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    return ((target - output).square().sum(0) / scale).mean()


def _seen_as(view: torch.Tensor, owner: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """``gradient`` of the parameter ``owner`` in the layout in which ``view`` [N, K] shows it."""
    same = torch.empty_strided(owner.shape, owner.stride(), dtype=gradient.dtype, device=gradient.device)
    same.copy_(gradient)
    return same.as_strided(view.shape, view.stride(), view.storage_offset() - owner.storage_offset())


@contextmanager
def _trainable(module: nn.Module, layers: Sequence[_Layer]) -> Iterator[None]:
    """Gradients for the layers' parameters and no others; afterwards weights and flags are what they were."""
    parameters = list(module.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    by_storage = {parameter.untyped_storage().data_ptr(): parameter for parameter in parameters}
    for layer in layers:
        if layer.state.weight.is_inference():
            raise UnprunableLayer(
                name=layer.state.name,
                why="it was made in inference mode, where besa can neither learn nor fold",
                help="Load the model outside torch.inference_mode.",
            )
        layer.owner = by_storage[layer.state.weight.untyped_storage().data_ptr()]
    before = [layer.state.weight.clone() for layer in layers]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for layer in layers:
            layer.owner.requires_grad_(True)
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, before, strict=True):
                layer.state.weight.copy_(weight)
        for parameter, flag in zip(parameters, flags, strict=True):
            parameter.requires_grad_(flag)
