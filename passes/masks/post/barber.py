"""LLM-Barber: kept and pruned weights change places where gradients of the output error say that it pays."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn.functional import pad

from sparsec.errors import BadRecipe, NonFinite
from sparsec.passes.masks.block import Block, LayerState
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.post.layers import owners, write


@dataclass(frozen=True)
class Barber:
    """Swap kept weights for pruned ones that matter more (LLM-Barber).

    For attention, then MLP (the children of a block that hold layers, in order): a dense fp32 twin is fed what the
    sparse part gets; g = d MSE(sparse output, dense output) / dW in the twin, for each sample. Score: |W| sqrt(mean
    g^2). In each row the i-th best pruned weight is paired with the i-th worst kept one, within groups of M where the
    pattern has them; of the K pairs where the pruned one scores higher, the best ceil(ratio * K) change places.
    Rows keep their number of weights, N:M and V:N:M groups theirs. Source: Su et al., "LLM-Barber: Block-Aware
    Rebuilder for Sparsity Mask in One-Shot for Large Language Models", 2024, arXiv 2408.10631; ratio 0.01.

    Other than the reference code: the number of swaps is rounded up (it truncates, so narrow layers are never
    touched); N:M pairs are made and counted inside their group (it picks growing weights by row, then prunes whatever
    is least in their groups, be that a better weight, or one too few); rows are done at once; a part whose output
    error grew is put back (``undo_worse``).
    """

    role: ClassVar[str] = "post"
    needs: ClassVar[tuple[str, ...]] = ("tokens",)
    moves_masks: ClassVar[bool] = True
    compares: ClassVar[bool] = False
    source: ClassVar[str] = "Su et al., 2024"
    cost: ClassVar[str] = "minutes; a backward pass of each block"

    ratio: Annotated[float, Field(gt=0, le=1)] = field(
        default=0.01, metadata={"doc": "share of a row's worthwhile swaps that are made, rounded up"}
    )
    retain_reconstruction: bool = field(
        default=False, metadata={"doc": "kept weights stay as the mask method updated them; else they are dense ones"}
    )
    unit: Literal["part", "block"] = field(
        default="part", metadata={"doc": "whose output error counts: each part's (attention, MLP) or the block's"}
    )
    undo_worse: bool = field(default=True, metadata={"doc": "put a part back where its output error grew"})

    def refine(self, block: Block) -> None:
        """Rebuild masks and weights part by part. Raises BadRecipe for block patterns, NonFinite for NaN."""
        for unit in [block.module] if self.unit == "block" else _parts(block.module, block.layers):
            held = owners(unit, block.layers)
            for layer, _ in held:
                _check_pattern(layer.pattern)
            if held:
                self._rebuild(block, unit, held)

    def _rebuild(self, block: Block, unit: nn.Module, held: Sequence[tuple[LayerState, str]]) -> None:
        twin = _Twin(unit, held)
        before = _observe(block, unit, twin.learn)
        if not math.isfinite(before) or not all(bool(square.isfinite().all()) for square in twin.squares):
            raise NonFinite(what="the output error or its gradient", name=block.name or "the model", where=" in barber")
        old = [(layer, layer.keep, layer.weight.clone()) for layer, _ in held]
        for (layer, _), square in zip(held, twin.squares, strict=True):
            values = layer.dense
            if self.retain_reconstruction and layer.keep is not None:
                values = torch.where(layer.keep, layer.weight.float(), layer.dense)
            assert layer.keep is not None
            score = values.abs() * square.div(max(twin.samples, 1)).sqrt()
            layer.keep = swapped(layer.keep, score, self.ratio, layer.pattern)
            write(layer, values)
        if self.undo_worse and not _observe(block, unit, twin.error) <= before:
            for layer, keep, weight in old:
                layer.keep = keep
                write(layer, weight)


def swapped(keep: torch.Tensor, score: torch.Tensor, ratio: float, pattern: MaskPattern) -> torch.Tensor:
    """``keep`` [N, K], bool, with the best ceil(ratio * K) pairs of each row swapped; ``score`` fp32 [N, K], finite."""
    rows, k = keep.shape
    m = pattern.group if pattern.sparsity is not None else k

    def grouped(values: torch.Tensor, hidden: torch.Tensor, fill: float) -> torch.Tensor:
        return pad(values.masked_fill(hidden, fill), (0, -k % m), value=fill).view(rows, -1, m)

    grow, grow_at = grouped(score, keep | ~_may_grow(keep, pattern), -math.inf).sort(
        dim=-1, descending=True, stable=True
    )
    drop, drop_at = grouped(score, ~keep, math.inf).sort(dim=-1, stable=True)
    pays = grow > drop
    # Counts in fp64: 25 * 0.6 is above 15 in fp32. And 0.07 * 100 is above 7 even there.
    swaps = (pays.sum((1, 2)).double() * (ratio * (1 - 1e-12))).ceil()
    # a group's pairs come best first, so the best of the row are the first few of each group
    order = grow.masked_fill(~pays, -math.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
    chosen = torch.arange(order.shape[1], device=keep.device) < swaps[:, None]
    made = torch.zeros_like(chosen).scatter_(1, order, chosen).view_as(pays)
    grown, dropped = (torch.zeros_like(made).scatter_(-1, at, made) for at in (grow_at, drop_at))
    return (keep | grown.flatten(1)[:, :k]) & ~dropped.flatten(1)[:, :k]


def _may_grow(keep: torch.Tensor, pattern: MaskPattern) -> torch.Tensor:
    """Where the pattern allows a weight to appear: V:N:M only in columns that its block of V rows already uses."""
    if pattern.kind != "vnm":
        return torch.ones_like(keep)
    v, n = pattern.params[0], len(keep)
    used = pad(keep, (0, 0, 0, -n % v)).view(-1, v, keep.shape[1]).any(1)
    return used.repeat_interleave(v, 0)[:n]


def _check_pattern(pattern: MaskPattern) -> None:
    if pattern.kind == "block":
        raise BadRecipe(
            detail=f"barber swaps single weights, which {pattern} does not allow; "
            "drop that step, or prune unstructured, N:M or V:N:M"
        )


def _parts(module: nn.Module, layers: Sequence[LayerState]) -> list[nn.Module]:
    """The children that hold layers, in order, and the entries of those that are lists; the module where none does."""
    parts: list[nn.Module] = []
    for child in module.children():
        if owners(child, layers):
            is_list = isinstance(child, (nn.ModuleList, nn.ModuleDict))
            parts += _parts(child, layers) if is_list else [child]
    return parts or [module]


def _observe(block: Block, unit: nn.Module, see: Callable[[Any, Any, torch.Tensor], float]) -> float:
    """Run the block over all batches; the sum of what ``see`` makes of each call of ``unit``."""
    total = 0.0

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        nonlocal total
        total += see(args, kwargs, _first_tensor(output))

    handle = unit.register_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            for batch in block.batches():
                block.run(batch)
    finally:
        handle.remove()
    return total


class _Twin:
    """A part of the block with its dense weights, in fp32.

    ``squares``: of each layer the sum of g^2 over samples, [N, K]. A sample is one entry of a batch [batch, tokens,
    width]; where a layer reads its tokens in one row (experts), the batch is one sample.
    """

    def __init__(self, unit: nn.Module, held: Sequence[tuple[LayerState, str]]) -> None:
        with _dense_weights(held):
            self.module = copy.deepcopy(unit)
        self.module.float().requires_grad_(False)
        self.layers = [self.module.get_submodule(name) for _, name in held]
        for layer in self.layers:
            layer.requires_grad_(True)  # or nothing would be recorded
        self.squares = [torch.zeros_like(layer.dense) for layer, _ in held]
        self.samples = 0

    def error(self, args: Any, kwargs: Any, output: torch.Tensor) -> float:
        """The sum over samples of the mean squared difference between ``output`` and the twin's."""
        with torch.no_grad():
            return float(self._errors(args, kwargs, output).sum())

    def learn(self, args: Any, kwargs: Any, output: torch.Tensor) -> float:
        """``error``, and its gradients added to ``squares``."""
        uses: list[tuple[int, torch.Tensor, torch.Tensor]] = []
        with torch.enable_grad(), ExitStack() as stack:
            for i, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(_recorder(uses, i)).remove)
            errors = self._errors(args, kwargs, output)
            total = errors.sum()
        self.samples += len(errors)
        if total.requires_grad:
            grads = torch.autograd.grad(total, [out for _, _, out in uses], allow_unused=True)
            self._add(uses, grads, len(errors))
        return float(total.detach())

    def _errors(self, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        dense = _first_tensor(self.module(*_as_float(args), **_as_float(kwargs)))
        squared = (dense - output.float()).square()
        return squared.flatten(1).mean(1) if squared.dim() > 2 else squared.mean().reshape(1)

    def _add(
        self,
        uses: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
        grads: Sequence[torch.Tensor | None],
        samples: int,
    ) -> None:
        for i, (layer, square) in enumerate(zip(self.layers, self.squares, strict=True)):
            pairs = [
                _tokens(layer, x, grad)
                for (used, x, _), grad in zip(uses, grads, strict=True)
                if used == i and grad is not None
            ]
            if any(len(x) != samples for x, _ in pairs):
                pairs = [(x.flatten(0, 1)[None], grad.flatten(0, 1)[None]) for x, grad in pairs]
            for sample in range(len(pairs[0][0]) if pairs else 0):
                square += sum(grad[sample].t() @ x[sample] for x, grad in pairs).square()  # type: ignore[union-attr]


def _recorder(uses: list[tuple[int, torch.Tensor, torch.Tensor]], i: int) -> Callable[..., torch.Tensor]:
    def record(_: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        uses.append((i, args[0].detach(), output))
        return output.clone()  # an activation may work in place, and the gradient of ``output`` is wanted

    return record


def _tokens(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's inputs and the gradient of its outputs, both as [samples, tokens, features]."""
    if isinstance(layer, nn.Conv2d):  # of a 1x1 convolution every position it reads is a token
        x, grad = (t if t.dim() == 4 else t[None] for t in (x, grad))
        (high, wide), edge = layer.stride, layer.padding
        x = pad(x, (edge[1], edge[1], edge[0], edge[0])) if isinstance(edge, tuple) else x
        x = x[:, :, ::high, ::wide]
        return x.flatten(2).transpose(1, 2), grad.flatten(2).transpose(1, 2)
    samples = len(x) if x.dim() > 2 else 1
    return x.reshape(samples, -1, x.shape[-1]), grad.reshape(samples, -1, grad.shape[-1])


@contextmanager
def _dense_weights(held: Sequence[tuple[LayerState, str]]) -> Iterator[None]:
    """With the dense weights in their places."""
    old = [layer.weight.clone() for layer, _ in held]
    with torch.no_grad():
        try:
            for layer, _ in held:
                layer.weight.copy_(layer.dense)
            yield
        finally:
            for (layer, _), weight in zip(held, old, strict=True):
                layer.weight.copy_(weight)


def _as_float(value: Any) -> Any:
    """Arguments of a call with fp32 in place of other floats, without history."""
    if isinstance(value, torch.Tensor):
        return value.detach().float() if value.is_floating_point() else value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_as_float(v) for v in value) if type(value) in (tuple, list) else value
    if isinstance(value, Mapping):
        return {k: _as_float(v) for k, v in value.items()}
    return value


def _first_tensor(output: Any) -> torch.Tensor:
    """The hidden states among what a module returns."""
    while not isinstance(output, torch.Tensor):
        output = output[0] if not isinstance(output, Mapping) else next(iter(output.values()))
    return output
