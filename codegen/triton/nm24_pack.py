"""How ``nm24`` lays 2:4 weights out, and plain torch that reads them back. The layout stands in ``nm24``.

Axes by name: n = 16 rows, k = 256 columns, j = k-tile (8), q = half of its columns (2), t = group of four in it (4),
h = half of the rows (2), g = row of it (8), v = kept value (2). Row = 16 n + 8 h + g, group of four = (k, j, q, t).
"""

from __future__ import annotations

import torch

from sparsec.codegen.spec import Packed
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind
from sparsec.grid import on_grid

ROWS, COLUMNS, GROUP = 16, 256, 128
# By which of four are kept (bit p: position p): (first | second << 2). Fewer than two: zeros fill up, in order.
NIBBLE = (4, 12, 13, 4, 14, 8, 9, 4, 12, 12, 13, 12, 14, 14, 14, 14)


def pack(weight: torch.Tensor, format: Format, source_key: str) -> Packed:
    """tensors: values, metadata (int32), scales (fp32), and an empty one of the weight's dtype.

    weight: [N, K] in bf16 or fp16. Raises PatternMismatch for other dtypes, a group of four that keeps more than two,
    and integers that the weight is not a grid of.
    """
    n, k = weight.shape
    kind, size = value_kind(format.values)
    if (format.pattern.kind, format.pattern.params) != ("nm", (2, 4)) or size not in (0, GROUP):
        raise PatternMismatch(format=str(format), detail=f"only 2:4 with groups of {GROUP} or whole rows is laid out")
    if kind not in ("bf16", "fp16", "int8", "int4"):
        raise PatternMismatch(format=str(format), detail="this kernel takes real values of 16 bits, int8 and int4")
    allowed = {"bf16": (torch.bfloat16,), "fp16": (torch.float16,)}.get(kind, (torch.bfloat16, torch.float16))
    if weight.dtype not in allowed:
        raise PatternMismatch(format=str(format), detail=f"its values are {weight.dtype}")
    groups = _grouped(weight)
    nibble = _nibbles(groups, format, k)
    scale = torch.zeros(0, device=weight.device)
    if kind in ("int8", "int4"):
        found = on_grid(weight, int(kind[3:]), size)
        if found is None:
            raise PatternMismatch(format=str(format), detail="the values are on no such grid")
        groups, scale = _grouped(found.q), _scales(found.scale, size, k)
    ordered = _axes(_kept(groups, nibble))
    blocks = ordered.shape[0] * ordered.shape[3]
    values = {"int8": _int8, "int4": _int4}.get(kind, _half)(ordered)
    zeros = 0x88888888 - 2**32 if kind == "int4" else 0
    tensors = (_ended(values, blocks, zeros), _ended(_metadata(nibble), blocks, 0x44444444), scale, weight.new_empty(0))
    return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)


def _grouped(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] padded with zeros to whole blocks, as groups of four."""
    n, k = weight.shape
    padded = torch.nn.functional.pad(weight.detach(), (0, -k % COLUMNS, 0, -n % ROWS))
    return padded.reshape(padded.shape[0], -1, 4)


def _nibbles(groups: torch.Tensor, format: Format, k: int) -> torch.Tensor:
    """[N, groups] uint8, (first | second << 2). Raises PatternMismatch."""
    kept = groups != 0
    bad = kept.sum(2, dtype=torch.uint8) > 2
    if bool(bad.any()):
        row, group = (int(i) for i in bad.nonzero()[0])
        detail = f"{int(bad.sum())} groups of four keep more than two, the first in row {row} from column {4 * group}"
        raise PatternMismatch(format=str(format), detail=detail)
    code = (kept * torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=groups.device)).sum(2, dtype=torch.uint8)
    return torch.tensor(NIBBLE, dtype=torch.uint8, device=groups.device)[code.int()]


def _kept(groups: torch.Tensor, nibble: torch.Tensor) -> torch.Tensor:
    """[N, groups, 2]: the two values that ``nibble`` names."""
    first, second = nibble & 3, nibble >> 2
    a, b, c, d = groups.unbind(2)
    left = torch.where(first == 0, a, torch.where(first == 1, b, c))
    right = torch.where(second == 1, b, torch.where(second == 2, c, d))
    return torch.stack([left, right], 2)


def _axes(kept: torch.Tensor) -> torch.Tensor:
    """[N, groups, 2] -> [n, h, g, k, j, q, t, v]."""
    return kept.view(-1, 2, 8, kept.shape[1] // 64, 8, 2, 4, 2)


def _half(x: torch.Tensor) -> torch.Tensor:
    """-> [n, k, j, g, t, q, h, v] as int32 of two values."""
    return x.permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous().view(torch.int32)


def _int8(x: torch.Tensor) -> torch.Tensor:
    """-> [n, k, j / 2, g, t, j % 2, q, (v, h)] as int32 of four bytes."""
    pairs = x.reshape(*x.shape[:4], 4, 2, 2, 4, 2)  # n h g k J j q t v
    return pairs.permute(0, 3, 4, 2, 7, 5, 6, 8, 1).reshape(-1, 4).contiguous().view(torch.int32)


def _int4(x: torch.Tensor) -> torch.Tensor:
    """-> [n, k, j / 4, g, t, j % 4, (v, q, h)] as int32 of eight nibbles, each plus 8."""
    fours = x.reshape(*x.shape[:4], 2, 4, 2, 4, 2).permute(0, 3, 4, 2, 7, 5, 8, 6, 1).reshape(-1, 4, 2)
    low, high = (fours + 8).to(torch.uint8).unbind(2)
    return (low | high << 4).contiguous().view(torch.int32)


def _metadata(nibble: torch.Tensor) -> torch.Tensor:
    """[N, groups] -> [n, k, g, j % 2, q, j / 2] int32 with nibble t of half h at bit 16 h + 4 t."""
    x = nibble.view(-1, 2, 8, nibble.shape[1] // 64, 4, 2, 2, 2, 2)  # n h g k J s q (t / 2) (t % 2)
    low, high = x.permute(0, 3, 2, 5, 6, 4, 1, 7, 8).unbind(8)
    return (low | high << 4).reshape(-1, 4).contiguous().view(torch.int32)


def _scales(scale: torch.Tensor, size: int, k: int) -> torch.Tensor:
    """Of rows: [N]. Of groups: [n, k, g, (group, h)] and a zero block. fp32."""
    if not size:
        return scale.flatten().float().contiguous()
    n = scale.shape[0]
    wide = -(-k // COLUMNS) * 2
    padded = torch.nn.functional.pad(scale.float(), (0, wide - scale.shape[1], 0, -n % ROWS))
    ordered = padded.view(-1, 2, 8, wide // 2, 2).permute(0, 3, 2, 4, 1)
    return torch.nn.functional.pad(ordered.flatten(), (0, 32))


def _ended(values: torch.Tensor, blocks: int, fill: int) -> torch.Tensor:
    """Flat, with one more block, all of ``fill``: what a warp without work reads."""
    flat = values.flatten()
    return torch.nn.functional.pad(flat, (0, len(flat) // blocks), value=fill)


def unpack(packed: Packed) -> torch.Tensor:
    """[N, K] in the dtype that was packed: by each block's axes, not by the kernel's registers."""
    values, meta, scale, like = packed.tensors
    n, k = packed.shape
    rows, steps = -(-n // ROWS), -(-k // COLUMNS)
    kind, size = value_kind(packed.format.values)
    kept = _kept_of(values[: -(len(values) // (rows * steps + 1))], kind, like.dtype, rows, steps)
    bytes_ = meta[:-128].view(torch.uint8).view(rows, steps, 8, 2, 2, 4, 2, 2)  # n k g s q J h (t / 2)
    nibble = torch.stack([bytes_ & 15, bytes_ >> 4], 8).flatten(7)
    nibble = nibble.permute(0, 6, 2, 1, 5, 3, 4, 7).reshape(rows * ROWS, steps * 64)
    at = torch.stack([nibble & 3, nibble >> 2], 2).long()
    dense = kept.new_zeros(rows * ROWS, steps * 64, 4).scatter_(2, at, kept).flatten(1)[:n, :k]
    if kind not in ("int8", "int4"):
        return dense
    if not size:
        return (dense.float() * scale[:, None]).to(like.dtype)
    wide = scale[:-32].view(rows, steps, 8, 2, 2).permute(0, 4, 2, 1, 3).reshape(rows * ROWS, steps * 2)
    return (dense.float() * wide.repeat_interleave(GROUP, 1)[:n, :k]).to(like.dtype)


def _kept_of(values: torch.Tensor, kind: str, dtype: torch.dtype, rows: int, steps: int) -> torch.Tensor:
    """[N, groups, 2] from the blocks: 16-bit values, or integers as int8."""
    if kind == "int8":
        x = values.view(torch.int8).view(rows, steps, 4, 8, 4, 2, 2, 2, 2)  # n k J g t j q v h
        x = x.permute(0, 8, 3, 1, 2, 5, 6, 4, 7)
    elif kind == "int4":
        low = values.view(torch.uint8)
        x = torch.stack([low & 15, low >> 4], 1).to(torch.int8).view(rows, steps, 2, 8, 4, 4, 2, 2, 2) - 8
        x = x.permute(0, 8, 3, 1, 2, 5, 7, 4, 6)  # n k J g t j v q h before
    else:
        x = values.view(dtype).view(rows, steps, 8, 8, 4, 2, 2, 2).permute(0, 6, 3, 1, 2, 5, 4, 7)  # n k j g t q h v
    return x.reshape(rows * ROWS, steps * 64, 2)
