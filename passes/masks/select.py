"""Scores in, masks out: ``select(score, pattern, sparsity, scope) -> keep``, bool [N, K], True where a weight stays.

The quota is exact and ties are decided by position: the lower index (row-major) is kept first, so the same scores give
the same mask on any machine. What competes with what:

  unstructured  the layer, all layers of a pool (``global``), or each row; round(sparsity * size) go
  block:RxC     the same with whole blocks in place of weights; a block counts by its mean, so that the narrower
                blocks at the edge of a matrix compete fairly
  N:M           each group of M along in-features keeps exactly N; a last group of r < M keeps min(N, r)
  V:N:M         each block of V x M keeps its four best columns, and each row N of those four
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from sparsec.passes.masks.pattern import VNM_COLUMNS, MaskPattern

_BAND = 1 << 22
_PAIRWISE = 32  # up to this group size, counting who beats whom is faster than sorting


@dataclass(frozen=True)
class Selector:
    """``Choose`` for one layer: column blocks handed in from left to right make up the layer's quota together.

    ``sparsity`` may be a tensor [N], one share for each row.
    """

    pattern: MaskPattern
    sparsity: float | torch.Tensor
    scope: str = "layer"
    norm: str = "l2"

    def __call__(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        if start % self.pattern.group:
            raise ValueError(f"a column block starts at {start}, inside a group of {self.pattern.group}")
        return select(score, self.pattern, self.sparsity, self.scope, norm=self.norm, start=start)


@dataclass(frozen=True)
class PoolSelector:
    """``Choose`` for one layer of a pool: everything above ``cut`` stays, and the first ``ties`` of those at it."""

    pattern: MaskPattern
    cut: int
    ties: int
    norm: str = "l2"

    def __call__(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        grid = _grid(score.float(), self.pattern, self.norm)
        return _spread(_above(_order(grid), self.cut, self.ties), score.shape, self.pattern)


def select(
    score: torch.Tensor,
    pattern: MaskPattern,
    sparsity: float | torch.Tensor,
    scope: str = "layer",
    *,
    norm: str = "l2",
    start: int = 0,
) -> torch.Tensor:
    """The keep-mask, bool, of one layer's scores [N, K] (any floating dtype, compared as fp32; NaN-free).

    ``sparsity`` in [0, 1) is the share that goes; N:M and V:N:M fix their own and do not read it, nor ``scope``. A
    tensor [N] is the share of each row, for unstructured masks.
    ``scope`` is ``layer``, ``row`` (for blocks: each row of blocks) or ``global``, which for one layer is ``layer``.
    ``norm`` says how the scores of a block or column add up: ``l2`` or ``sum``. ``start``: how many columns of the
    layer came before these, in calls of their own; shares are rounded over all columns so far, so that the errors of
    the single calls do not add up.
    """
    score = score.float()
    if pattern.kind == "nm":
        n, m = pattern.params
        return _keep_in_groups(score, n, m)
    if pattern.kind == "vnm":
        return _keep_vnm(score, pattern.params, norm)
    if isinstance(sparsity, torch.Tensor):
        if pattern.kind != "unstructured":
            raise ValueError(f"rows of their own sparsity cannot be {pattern}")
        return _row_by_row(score, sparsity, start)
    grid = _grid(score, pattern, norm)
    before = start // pattern.group  # columns of the grid
    if scope == "row":
        goes = _quota(grid.shape[1], sparsity, before)
        return _spread(_top_per_row(grid, grid.shape[1] - goes), score.shape, pattern)
    kept = grid.numel() - _quota(grid.numel(), sparsity, len(grid) * before)
    keys = _order(grid)
    cut, (ties,) = _find_cut([lambda: keys], kept)
    return _spread(_above(keys, cut, ties), score.shape, pattern)


def select_pool(
    scores: Sequence[Callable[[], torch.Tensor]], pattern: MaskPattern, sparsity: float, *, norm: str = "l2"
) -> list[PoolSelector]:
    """One threshold for many layers (scope ``global``): a ``Choose`` for each, ties kept in the order given.

    ``scores`` are called several times, one after the other, so that only one layer's scores exist at a time. For
    block patterns the share is of blocks. Raises ValueError for N:M patterns, where nothing competes across layers.
    """
    if pattern.sparsity is not None:
        raise ValueError(f"{pattern} keeps its share in every group; there is nothing to pool")

    def keys_of(score: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        return lambda: _order(_grid(score().float(), pattern, norm))

    keys = [keys_of(score) for score in scores]
    total = sum(key().numel() for key in keys)
    cut, ties = _find_cut(keys, total - _quota(total, sparsity))
    return [PoolSelector(pattern, cut, count, norm) for count in ties]


def _quota(size: int, sparsity: float, before: int = 0) -> int:
    """How many of ``size`` go that follow ``before`` others: what goes of all of them, less what went of those."""
    return min(size, _until(before + size, sparsity) - _until(before, sparsity))


def _until(size: int, sparsity: float) -> int:
    return math.floor(sparsity * size + 0.5)  # to the nearest, a half upwards; int() would make 28 of 0.29 * 100


def _grid(score: torch.Tensor, pattern: MaskPattern, norm: str) -> torch.Tensor:
    """The scores of what competes: weights, or blocks [ceil(N / R), ceil(K / C)] by root mean square or mean."""
    if pattern.kind == "unstructured":
        return score
    rows, cols = pattern.params
    n, k = score.shape
    total = _block_sums(score.square() if norm == "l2" else score, rows, cols)
    high = torch.full((total.shape[0], 1), rows, device=score.device)
    wide = torch.full((1, total.shape[1]), cols, device=score.device)
    high[-1] -= -n % rows
    wide[:, -1] -= -k % cols
    mean = total / (high * wide)
    return mean.sqrt() if norm == "l2" else mean


def _block_sums(values: torch.Tensor, rows: int, cols: int) -> torch.Tensor:
    n, k = values.shape
    padded = pad(values, (0, -k % cols, 0, -n % rows))
    return padded.view(padded.shape[0] // rows, rows, -1, cols).sum((1, 3))


def _spread(keep: torch.Tensor, shape: torch.Size, pattern: MaskPattern) -> torch.Tensor:
    """The mask of the grid as a mask of the weights."""
    if pattern.kind == "unstructured":
        return keep
    rows, cols = pattern.params
    return keep.repeat_interleave(rows, 0)[: shape[0]].repeat_interleave(cols, 1)[:, : shape[1]]


def _order(score: torch.Tensor) -> torch.Tensor:
    """int32 keys in the order of the scores as fp32; -0.0 and 0.0 are equal."""
    bits = (score + 0.0).contiguous().view(torch.int32)
    if bool((bits < 0).any()):
        bits ^= (bits >> 31) & 0x7FFFFFFF  # the more negative, the larger its bits
    return bits


def _find_cut(keys: Sequence[Callable[[], torch.Tensor]], kept: int) -> tuple[int, list[int]]:
    """The ``kept``-th largest of all keys, and how many of those equal to it each tensor of them keeps.

    Two histograms of 16 bits each find it exactly without sorting and without holding more than one tensor.
    """
    if kept == 0:
        return 2**31 - 1, [0 for _ in keys]
    high, above = _bucket([_histogram(key() >> 16) for key in keys], kept)
    low_counts = [_histogram(_low_half(key(), high)) for key in keys]
    low, over = _bucket(low_counts, kept - above)
    room = kept - above - over
    ties = []
    for counts in low_counts:
        ties.append(min(room, int(counts[low + 32768])))
        room -= ties[-1]
    return (high << 16) + low + 32768, ties


def _low_half(keys: torch.Tensor, high: int) -> torch.Tensor:
    """The lower 16 bits, moved to -32768..32767, of the keys whose upper 16 bits are ``high``."""
    return (keys[(keys >> 16) == high] & 0xFFFF) - 32768


def _histogram(values: torch.Tensor) -> torch.Tensor:
    """Counts [65536] of 16-bit values -32768..32767; band by band, since bincount widens what it reads."""
    counts = torch.zeros(65536, dtype=torch.int64, device=values.device)
    for band in torch.split(values.flatten(), _BAND):
        counts += torch.bincount(band + 32768, minlength=65536)
    return counts.cpu()


def _bucket(counts: Sequence[torch.Tensor], kept: int) -> tuple[int, int]:
    """The bucket that holds the ``kept``-th largest value, and how many values lie above that bucket."""
    down = torch.stack(list(counts)).sum(0).flip(0).cumsum(0)
    place = int(torch.searchsorted(down, kept))
    return 65535 - place - 32768, int(down[place - 1]) if place else 0


def _above(keys: torch.Tensor, cut: int, ties: int) -> torch.Tensor:
    """Keys over the cut, and the first ``ties`` of those at it in row-major order."""
    keep = keys > cut
    if ties:
        at = (keys == cut).flatten().nonzero().flatten()[:ties]
        keep.view(-1)[at] = True
    return keep


def _top_per_row(score: torch.Tensor, kept: int) -> torch.Tensor:
    """The ``kept`` largest of each row, lower index first among equals."""
    if kept == 0 or kept == score.shape[1]:
        return torch.full(score.shape, kept > 0, device=score.device)
    threshold = score.kthvalue(score.shape[1] - kept + 1, dim=1, keepdim=True).values
    keep, ties = score > threshold, score == threshold
    room = kept - keep.sum(1, keepdim=True)
    return keep | (ties & (ties.cumsum(1) <= room))


def _row_by_row(score: torch.Tensor, sparsity: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Each row keeps its own number, lower index first among equals."""
    columns = score.shape[1]
    kept = torch.tensor([columns - _quota(columns, s, start) for s in sparsity.tolist()], device=score.device)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(score.shape[1], device=score.device).expand_as(order)
    )
    return rank < kept[:, None]


def _keep_in_groups(score: torch.Tensor, n: int, m: int) -> torch.Tensor:
    rows, k = score.shape
    groups = pad(score, (0, -k % m), value=-math.inf).reshape(-1, m)
    keep = _first_of_few(groups, n) if m <= _PAIRWISE else _top_per_row(groups, n)
    return keep.reshape(rows, -1)[:, :k]


def _first_of_few(groups: torch.Tensor, kept: int) -> torch.Tensor:
    """``_top_per_row`` for narrow rows: an element stays when fewer than ``kept`` beat it."""
    columns = groups.t().contiguous()
    beaten = torch.zeros(columns.shape, dtype=torch.uint8, device=groups.device)
    for i in range(len(columns)):
        for j in range(i + 1, len(columns)):
            later_wins = columns[j] > columns[i]  # on a tie the earlier one wins
            beaten[i] += later_wins
            beaten[j] += ~later_wins
    return (beaten < kept).t()


def _keep_vnm(score: torch.Tensor, params: tuple[int, ...], norm: str) -> torch.Tensor:
    v, n, m = params
    worth = _block_sums(score.square() if norm == "l2" else score, v, 1)
    columns = _keep_in_groups(worth, VNM_COLUMNS, m).repeat_interleave(v, 0)[: score.shape[0]]
    return _keep_in_groups(score.masked_fill(~columns, -math.inf), n, m) & columns
