"""PGB: the rows and columns of a weight are grouped so that its important weights lie in few blocks; only those stay.

In: a weight [N, K], its inputs' X X^T [K, K], how many weights stay. Out: a mask that is block-diagonal after one
permutation of the rows and one of the columns, and the values of what stays. ``regroup`` gives the permutations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from sparsec.errors import BadRecipe
from sparsec.passes.masks import obs
from sparsec.passes.masks.contract import Choose, Pruned, Statistics, pattern_of

_POWERS = 10  # of the scaled importance times its transpose: enough for groups that stand out at all
_NOISE = 1e-13  # a share of the sum; smaller gains are rounding


@dataclass(frozen=True)
class PGB:
    """Gather the important weights in G blocks by permutation; the rest goes.

    Rows and columns are divided into G groups each (sizes differ by at most one), and weight ij may stay where its row
    and its column have the same group: sorted by group, the weight is block-diagonal, a grouped linear layer between
    two permutations, G dense products of 1/G^2 of the size. The grouping is to keep the most importance
    w_ij^2 / [H^-1]_jj, H = X X^T + damp * mean(diag) * I; the weights that stay are then updated for those that go by
    the column solver of SparseGPT (``reconstruct`` after this step makes it each row's least-squares optimum).
    Source: Lim et al., "PGB: One-Shot Pruning for BERT via Weight Grouping and Permutation", 2025.

    Of the paper only the abstract and a review were at hand: that important weights are grouped by permutation in
    attention and feed-forward layers, all others go at once, and the kept ones are updated. Ours: the importance,
    equal groups, and the search: a spectral start, then rows given columns and columns given rows, each the exact
    optimum, until nothing improves. The paper also drops whole layers in which no group is important; here every
    layer keeps the recipe's share. The mask stands in the weight's own order; permutations are no part of the result.

    The quota is exact. Sparsity 1 - 1/G fills the blocks; in between, the largest G whose blocks hold enough is taken
    and the least important weights in the blocks go too. So below sparsity 0.5 there is one group, and no structure.

    The structure costs accuracy where weights have none: on Gaussian ones the output error at 0.5 is three times that
    of SparseGPT's free mask. What it buys: G small dense products can do the work; no format here does it yet.
    """

    role: ClassVar[str] = "mask"
    needs: ClassVar[tuple[str, ...]] = ("xxt",)
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "sum"
    source: ClassVar[str] = "Lim et al., 2025"
    cost: ClassVar[str] = "minutes: one forward pass and K^3 + N K^2 + rounds N K G a layer"

    groups: Annotated[int, Field(ge=1)] | None = field(
        default=None, metadata={"doc": "diagonal blocks; null: the most that hold what the sparsity keeps"}
    )
    rounds: Annotated[int, Field(ge=1)] = field(
        default=20, metadata={"doc": "regroupings of rows and columns at most; it ends when nothing improves"}
    )
    damp: Annotated[float, Field(ge=0)] = field(
        default=0.01, metadata={"doc": "share of the mean of the Hessian's diagonal that is added to it"}
    )

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        """Mask and fp32 values of ``weight`` [N, K]. Raises BadRecipe (pattern, too many groups), SingularHessian."""
        if pattern_of(choose).kind != "unstructured":
            raise BadRecipe(
                detail=f"pgb makes blocks of its own and needs pattern unstructured, not {pattern_of(choose)}"
            )
        factor, dead = obs.inverse_factor(stats["xxt"], self.damp)
        alive = weight.float().masked_fill(dead, 0.0)
        keep = self._keep(importance(alive, factor), choose)
        values = obs.prune(alive, factor, keep).values
        assert values is not None
        return Pruned(keep, torch.where(dead, weight.float() * keep, values))

    def _keep(self, worth: torch.Tensor, choose: Choose) -> torch.Tensor:
        """The mask, bool [N, K]: the quota of ``choose`` from inside the blocks."""
        kept = int(choose(worth).sum())
        for groups in self._candidates(worth.shape, kept):
            inside = regroup(worth, groups, self.rounds).blocks().to(worth.device)
            # Below every weight of the blocks, and in order: what ``choose`` takes of them, the blocks had no room for.
            keep = choose(torch.where(inside, worth, -1.0 / worth))
            if not bool((keep & ~inside).any()):
                return keep
        raise BadRecipe(
            detail=f"pgb cannot keep {kept} weights of a {worth.shape[0]} x {worth.shape[1]} layer in {self.groups} "
            "diagonal blocks; give fewer groups, a higher sparsity, or leave groups out"
        )

    def _candidates(self, shape: torch.Size, kept: int) -> Iterator[int]:
        """Group counts to try. Quotas by row may not fit where the layer's does; one group holds everything."""
        n, k = shape
        for groups in range(min(n, k), 0, -1):
            if (self.groups in (None, groups)) and capacity(n, k, groups) >= kept:
                yield groups


@dataclass(frozen=True)
class Grouping:
    """``rows`` int64 [N] and ``columns`` int64 [K]: groups, 0..G-1. ``kept``: importance in the blocks by round."""

    rows: torch.Tensor
    columns: torch.Tensor
    kept: tuple[float, ...]

    def blocks(self) -> torch.Tensor:
        """bool [N, K], True where a row and a column have the same group."""
        return self.rows[:, None] == self.columns

    def orders(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Permutations of rows and columns: ``weight[rows][:, columns]`` has the blocks on its diagonal."""
        return self.rows.argsort(stable=True), self.columns.argsort(stable=True)


def importance(weight: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """w^2 / [H^-1]_jj, [N, K]: what removing a weight alone costs. ``factor``: U [K, K] with H^-1 = U^T U."""
    return weight.square() / factor.square().sum(0)


def capacity(n: int, k: int, groups: int) -> int:
    """How many weights the diagonal blocks of an n x k weight hold; the larger row groups meet the larger columns'."""
    return sum(int(h * w) for h, w in zip(_sizes(n, groups), _sizes(k, groups), strict=True))


def regroup(worth: torch.Tensor, groups: int, rounds: int) -> Grouping:
    """Divide the rows and columns of ``worth`` [N, K], not negative, so that most of it lies in the diagonal blocks.

    Gives a grouping that no reassignment of the rows alone, nor of the columns alone, improves, unless ``rounds`` ended
    first. Deterministic; fp64, on the CPU. ``groups`` is at most min(N, K).
    """
    worth = worth.double().cpu()
    worth = worth / worth.max().clamp_min(torch.finfo(worth.dtype).tiny)
    rows = _spectral_rows(worth, groups)
    # Among row groups of one size, those that more columns lean to come first: the first column groups are the larger.
    leaning = _sums(worth.t(), rows, groups).argmax(1).bincount(minlength=groups)
    rows = _ranked(rows.bincount(minlength=groups) * (worth.shape[1] + 1) + leaning)[rows]
    columns = balance(_sums(worth.t(), rows, groups), _in_turn(worth.shape[1], groups))
    kept = [_kept(worth, rows, columns)]
    for _ in range(rounds if groups > 1 else 0):
        new_rows = balance(_sums(worth, columns, groups), rows)
        new_columns = balance(_sums(worth.t(), new_rows, groups), columns)
        now = _kept(worth, new_rows, new_columns)
        if now <= kept[-1]:
            break
        rows, columns = new_rows, new_columns
        kept.append(now)
    return Grouping(rows, columns, tuple(kept))


def balance(benefit: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """The groups [n] with the largest sum of ``benefit[i, group of i]`` among those of the sizes that ``start`` has.

    ``benefit`` [n, G] fp64. A transport problem: a grouping is optimal if no ring of groups gains by each handing one
    member on to the next. Rings of two come first, all swaps of a pair at once, since they do nearly all of the work.
    """
    labels, least = start.clone(), _NOISE * float(benefit.abs().sum())
    while True:
        gains = _gains(benefit, labels)
        pairs = (gains + gains.t()).triu(1) > least
        if sum(_swap(benefit, labels, g, h, least) for g, h in pairs.nonzero().tolist()):
            continue
        if not _turn(benefit, labels, _ring(gains, least), least):
            return labels


def _gains(benefit: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[G, G]: the most that moving one member of g to h gains; -inf on the diagonal, where nothing moves."""
    moves = benefit - benefit.gather(1, labels[:, None])
    gains = moves.new_full((benefit.shape[1], benefit.shape[1]), -torch.inf)
    gains.scatter_reduce_(0, labels[:, None].expand_as(moves), moves, "amax")
    return gains.fill_diagonal_(-torch.inf)


def _swap(benefit: torch.Tensor, labels: torch.Tensor, g: int, h: int, least: float) -> bool:
    """Divide the members of two groups anew, at best; in place. Whether that gained more than ``least``."""
    members = ((labels == g) | (labels == h)).nonzero().flatten()
    lead = benefit[members, g] - benefit[members, h]
    before = labels[members] == g
    after = torch.zeros_like(before)
    after[lead.argsort(descending=True, stable=True)[: int(before.sum())]] = True
    if float(lead[after].sum() - lead[before].sum()) <= least:
        return False
    labels[members] = torch.where(after, g, h)
    return True


def _ring(gains: torch.Tensor, least: float) -> list[int]:
    """Groups, each handing one member to the next and the last to the first, that gain by it; empty if none (Bellman
    and Ford: paths that still grow after as many steps as there are groups have gone round)."""
    best = gains.new_zeros(len(gains))
    origin = torch.zeros(len(gains), dtype=torch.int64)
    better = torch.zeros(len(gains), dtype=torch.bool)
    for _ in gains:
        reach, via = (best[:, None] + gains).max(0)
        better = reach > best + least
        if not bool(better.any()):
            return []
        best, origin = torch.where(better, reach, best), torch.where(better, via, origin)
    back: list[int] = origin.tolist()
    node = int(better.nonzero()[0])
    for _ in back:
        node = back[node]
    ring = [node]
    while (node := back[node]) != ring[0]:
        ring.append(node)
    return ring[::-1]


def _turn(benefit: torch.Tensor, labels: torch.Tensor, ring: list[int], least: float) -> bool:
    """Hand one member of each group of ``ring`` to the next; in place. Whether that gained more than ``least``."""
    gained, moves = 0.0, []
    for g, h in zip(ring, ring[1:] + ring[:1], strict=True):
        members = (labels == g).nonzero().flatten()
        lead = benefit[members, h] - benefit[members, g]
        best = int(lead.argmax())
        gained += float(lead[best])
        moves.append((int(members[best]), h))
    if gained <= least:
        return False
    for member, h in moves:
        labels[member] = h
    return True


def _spectral_rows(worth: torch.Tensor, groups: int) -> torch.Tensor:
    """Groups of rows [N] to start from, by the leading singular vectors of ``worth`` over the roots of its sums.

    In them the rows of one block point the same way and those of two blocks at right angles (Dhillon, "Co-clustering
    documents and words using bipartite spectral graph partitioning", 2001), so G rows picked each for being farthest
    from the span of those before it are one of each block, and the others go with the nearest.
    """
    high, wide = (torch.where(total > 0, total, 1.0).rsqrt() for total in (worth.sum(1), worth.sum(0)))
    scaled = worth * high[:, None] * wide
    basis = torch.randn(worth.shape[1], groups, dtype=worth.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(_POWERS):
        basis = torch.linalg.qr(scaled.t() @ (scaled @ basis)).Q
    points = torch.nn.functional.normalize(scaled @ basis, dim=1)
    rest, picked = points.clone(), []
    for _ in range(groups):
        picked.append(int(rest.square().sum(1).argmax()))
        direction = torch.nn.functional.normalize(rest[picked[-1]], dim=0)
        rest = rest - torch.outer(rest @ direction, direction)
    near = points @ points[picked].t()
    rank = _ranked(near.argmax(1).bincount(minlength=groups))  # the first groups are the larger ones
    return balance(near[:, rank.argsort()], _in_turn(len(worth), groups))


def _ranked(size: torch.Tensor) -> torch.Tensor:
    """The place [G] of each group when the largest comes first."""
    return size.argsort(descending=True, stable=True).argsort()


def _sizes(count: int, groups: int) -> list[int]:
    return [count // groups + (g < count % groups) for g in range(groups)]


def _in_turn(count: int, groups: int) -> torch.Tensor:
    """Groups [count] in the present order."""
    return torch.arange(groups).repeat_interleave(torch.tensor(_sizes(count, groups)))


def _sums(worth: torch.Tensor, others: torch.Tensor, groups: int) -> torch.Tensor:
    """[n, G]: what each line of ``worth`` [n, m] has in each group of the m others."""
    return worth @ torch.nn.functional.one_hot(others, groups).to(worth.dtype)


def _kept(worth: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> float:
    return float(worth[rows[:, None] == columns].sum())
