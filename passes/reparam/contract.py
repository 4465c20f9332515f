"""What an equivalent rewrite is: a frozen dataclass that folds permutations or scales into a block's own weights.

Its step stands before that of the mask method: ``steps: [{method: permute}, {method: wanda, pattern: 2:4}]``. It runs
on dense weights, and the block computes what it computed before; only which weights share a group, or compete with
which, is changed. Registered in ``sparsec.passes.masks.METHODS`` with ``role = "reparam"``.

A rewrite changes what enters some layers. Their statistics need not be collected again: ``permuted`` and ``scaled``
say what they would have been.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import torch

    from sparsec.passes.masks.block import Block
    from sparsec.passes.masks.contract import Statistics
    from sparsec.passes.masks.pattern import MaskPattern

Side: TypeAlias = Literal["in", "out"]


@dataclass(frozen=True)
class Folded:
    """What was done to one block.

    ``folded``: layers whose in-features were permuted or scaled. ``gathers``: layers that were left alone because the
    rewrite would have to stay in the graph as an operation before them. ``kept``: layer -> share of its score that
    the pattern keeps, before and after (permutations only). ``notes``: sentences for the report.
    """

    folded: tuple[str, ...] = ()
    gathers: int = 0
    kept: tuple[tuple[str, float, float], ...] = ()
    notes: tuple[str, ...] = ()


@runtime_checkable
class Reparam(Protocol):
    role: ClassVar[str]  # "reparam"
    needs: ClassVar[tuple[str, ...]]
    source: ClassVar[str]
    cost: ClassVar[str]

    def apply(self, block: Block) -> Folded:
        """Write equivalent weights into ``block.module``; ``block.layers`` (dense, stats) are brought up to date.

        fp32: the block's outputs stay within 1e-5 of their norm on the first batch, or nothing is written and a note
        says so.
        """
        ...


def held_by(pattern: MaskPattern) -> tuple[Side, ...]:
    """The sides of a layer whose order its mask depends on: groups of N:M lie along in-features, blocks along both."""
    if pattern.kind == "unstructured":
        return ()
    tall = pattern.kind != "nm" and pattern.params[0] > 1
    wide = pattern.kind != "block" or pattern.params[1] > 1
    return (*(("in",) if wide else ()), *(("out",) if tall else ()))


@dataclass(frozen=True)
class _Axes:
    """Of one statistic: its axes over in- and out-features, and the power of x (for gradients: of 1 / W) in it."""

    ins: tuple[int, ...] = ()
    outs: tuple[int, ...] = ()
    power: int = 0


_AXES: Mapping[str, _Axes] = {
    "tokens": _Axes(),
    "sum_x2": _Axes(ins=(0,), power=2),
    "sum_x4": _Axes(ins=(0,), power=4),
    "xxt": _Axes(ins=(0, 1), power=1),
    "absmax": _Axes(ins=(0,), power=1),
    "histogram": _Axes(ins=(0,)),  # its range follows the column in powers of two: scales that are such change nothing
    "entropy": _Axes(ins=(0,)),
    "sample": _Axes(ins=(1,), power=1),
    "grad2": _Axes(ins=(1,), outs=(0,), power=2),
    "grad_abs": _Axes(ins=(1,), outs=(0,), power=1),
    "spsa": _Axes(ins=(1,), outs=(0,), power=1),
}


def permuted(stats: Statistics, order: torch.Tensor, side: Side) -> dict[str, torch.Tensor]:
    """The statistics of a layer whose in- or out-feature j is now what ``order[j]`` (int64 [K] or [N]) was.

    Gives a new dict; raises KeyError for a name that is not in ``STATISTICS``.
    """
    moved = dict(stats)
    for name, value in stats.items():
        for axis in _AXES[name].ins if side == "in" else _AXES[name].outs:
            value = value.index_select(axis, order.to(value.device))
        moved[name] = value
    return moved


def scaled(stats: Statistics, scale: torch.Tensor, side: Side) -> dict[str, torch.Tensor]:
    """The statistics of a layer after a positive ``scale`` [K] or [N] went through it.

    ``in``: x was divided by it and the weight's columns multiplied, so what is a gradient is divided as x is. ``out``:
    the weight's rows were divided by it, which multiplies their gradients and leaves x alone. Counts of a histogram
    stay as they are, which is exact for powers of two.
    """
    moved = dict(stats)
    for name, value in stats.items():
        axes = _AXES[name]
        for axis in axes.ins if side == "in" else axes.outs:
            shape = [1] * value.dim()
            shape[axis] = -1
            power = -axes.power if side == "in" else axes.power
            value = value * scale.to(value).pow(power).view(shape) if power else value
        moved[name] = value
    return moved
