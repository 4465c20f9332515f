"""Outliers beside a coded weight, the CPU's sidecar: W = main + outliers, which share no position.

  begin[tiles + 1] int32  first quad of each tile of 16 rows
  place[Q, 5] int16       unsigned: row in the tile, four columns; int32 for more than 65536 columns
  value[Q, 4]             in the weight's dtype; a row's last quad is filled up with zeros at its first column

A quad has outliers of one row, ascending; in a tile the first quads of all rows come before the second ones.
Every coded pack has the three; most have no outlier in them. SpQR (Dettmers et al., 2023) and SqueezeLLM (Kim et al.,
2023, "dense-and-sparse") keep 0.05 to 1 % of weights so. Here they are found again in the float weight: what is on no
grid, where nearly everything else of its group is on one.
"""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import packer
from sparsec.codegen.cpp.codes import BITS, Codes, codes_of
from sparsec.errors import PatternMismatch
from sparsec.formats import BOOKS, Format, value_kind
from sparsec.grid import common_scale

MOST = 0.03  # of a weight's values; more are no outliers, and a whole weight in their format costs less
QUAD = 4  # outliers of a row that are multiplied together
_TRIED = 1 << 22  # values that are looked at together


def split(weight: torch.Tensor, format: Format, key: str = "") -> tuple[torch.Tensor, torch.Tensor, Codes]:
    """(main, outliers, codes of main) of a weight [N, K]; main and outliers are dense, and main is the weight itself
    where it has no outliers.

    ``key``: of the weight's content, as ``codes_of``. Raises PatternMismatch where there are more than a few.
    """
    try:
        return weight, torch.zeros_like(weight), codes_of(weight, format, key)
    except PatternMismatch:
        out = _off_grid(weight, format)
        if out is None:
            raise
    main = weight.masked_fill(out, 0.0)
    return main, weight.masked_fill(~out, 0.0), codes_of(main, format)


def _off_grid(weight: torch.Tensor, format: Format) -> torch.Tensor | None:
    """Where the outliers are, bool [N, K]; None where more than MOST are off, or one is not finite."""
    if not bool(weight.isfinite().all()):
        return None
    kind, group = value_kind(format.values)
    n, k = weight.shape
    size = group or k
    grouped = torch.nn.functional.pad(weight, (0, -k % size)).view(-1, size)
    few = grouped[torch.linspace(0, len(grouped) - 1, min(len(grouped), 32)).long()]  # refuse soon what is no grid
    if _share(_off(few, kind)) > 2 * MOST:
        return None
    step = max(1, _TRIED // size)
    off = torch.cat([_off(part, kind) for part in torch.split(grouped, step)]).view(n, -1)[:, :k]
    return off if _share(off) <= MOST else None


def _share(off: torch.Tensor) -> float:
    return float(off.float().mean())


def _off(part: torch.Tensor, kind: str) -> torch.Tensor:
    """What of each group [G, size] is on no grid, where the best grid is the one that holds most of the group."""
    if kind in BOOKS:
        return _off_book(part, BOOKS[kind])
    top = 1 if kind == "ternary" else 2 ** (BITS[kind] - 1) - 1
    left = torch.arange(len(part))
    best = torch.ones_like(part, dtype=torch.bool) & (part != 0)
    order = part.float().abs().sort(1, descending=True).values
    tries = min(part.shape[1], 2 + int(2 * MOST * part.shape[1]) + 2)
    for at in range(tries):
        for step in (top,) if kind != "int4" else range(top, 0, -1):
            off = _off_scale(part[left], order[left, at, None] / step, top)
            better = off.sum(1) < best[left].sum(1)
            best[left[better]] = off[better]
            good = best[left].sum(1) <= min(at, max(1, int(MOST * part.shape[1])))
            left = left[~good]
            if not len(left):
                return best
    return best


def _off_scale(part: torch.Tensor, scale: torch.Tensor, top: int) -> torch.Tensor:
    """What is not within -top .. top times a scale [G, 1], or the scales that rounding leaves next to it."""
    wide, scale = part.float(), scale.clamp(min=torch.finfo(torch.float32).tiny)

    def off(scale: torch.Tensor) -> torch.Tensor:
        q = (wide / scale).round()
        return (q.abs() > top) | ((q * scale).to(part.dtype) != part)

    found = off(scale)
    if part.dtype == torch.float32:
        others = [scale.nextafter(torch.full_like(scale, to)) for to in (torch.inf, -torch.inf)]
    else:  # products of 16 bits were rounded: least squares over what is near, then what they all allow
        q = (wide / scale).round()
        near = (q.abs() <= top) & ((q * scale - wide).abs() <= wide.abs() * 2.0**-7)
        q = q * near
        fitted = (wide * q).sum(1, keepdim=True) / (q * q).sum(1, keepdim=True).clamp(min=1)
        others = [common_scale(part.masked_fill(~near, 0.0), fitted, of_largest=False)]
    for other in others:
        again = off(other.clamp(min=torch.finfo(torch.float32).tiny))
        found = torch.where(again.sum(1, keepdim=True) < found.sum(1, keepdim=True), again, found)
    return found


def _off_book(part: torch.Tensor, most: int) -> torch.Tensor:
    """Rows have up to ``most`` frequent values, 0 among them; the rarest others are off."""
    off = torch.zeros_like(part, dtype=torch.bool)
    for row, out in zip(part, off, strict=True):
        values, where, counts = (row + 0.0).unique(return_inverse=True, return_counts=True)
        if len(values) > most:
            counts[values == 0] = len(row) + 1  # main is 0 where an outlier stands
            room = most if bool((values == 0).any()) else most - 1
            out |= ~torch.isin(where, counts.topk(room).indices)
    return off


def stream(aside: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(begin, place, value) of outliers [N, K], mostly zero."""
    n, k = aside.shape
    tiles = -(-n // packer.TILE)
    row, column = aside.nonzero().unbind(1)
    counts = torch.bincount(row, minlength=n)
    number = torch.arange(len(row)) - packer.prefix(counts)[row]  # of an outlier in its row
    quads = -(-counts // QUAD)
    of_quad = torch.repeat_interleave(torch.arange(n), quads)
    turn = torch.arange(len(of_quad)) - packer.prefix(quads)[of_quad]
    tile, in_tile = of_quad // packer.TILE, of_quad % packer.TILE
    order = ((tile * (k // QUAD + 1) + turn) * packer.TILE + in_tile).argsort()
    new_place = torch.empty_like(order)
    new_place[order] = torch.arange(len(order))
    quad = new_place[packer.prefix(quads)[row] + number // QUAD]

    first = number % QUAD == 0
    place = torch.zeros(len(order), 1 + QUAD, dtype=torch.int64)
    place[new_place, 0] = in_tile
    place[quad[first], 1:] = column[first, None]
    place[quad, 1 + number % QUAD] = column
    value = aside.new_zeros(len(order), QUAD)
    value[quad, number % QUAD] = aside[row, column]
    begin = packer.prefix(torch.bincount(tile, minlength=tiles)).int()
    return begin, place.to(torch.int16 if k <= 2**16 else torch.int32), value


def joined(main: torch.Tensor, stream: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """main + outliers [N, K], by plain torch."""
    begin, place, value = stream
    tile = torch.repeat_interleave(torch.arange(len(begin) - 1), begin.diff().long())
    wide = place.long() & 0xFFFF if place.dtype == torch.int16 else place.long()
    row = (tile * packer.TILE + wide[:, 0])[:, None].expand(-1, QUAD)
    kept = value != 0
    out = main.clone()
    out[row[kept], wide[:, 1:][kept]] = value[kept]
    return out
