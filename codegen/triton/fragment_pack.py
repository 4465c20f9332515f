"""How ``fragment`` lays weights out in the register order of ``mma16``, and plain torch that reads them back.

A block is 16 rows x 256 columns, row 8 h + g. Dense columns 32 j + 8 t + 4 H + 2 p + v; 8:16 has its 16 neighbours in
one lane, 64 (j / 2) + 16 t + 8 (j % 2) + 4 H + 2 p + v. Lane 4 g + t has the words of a 16-byte load side by side:
block, load, lane, word of four.
"""

from __future__ import annotations

import torch

from sparsec.codegen.triton import values as quantised
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind
from sparsec.grid import OnGrid

ROWS, COLUMNS = 16, 256
BITS = {"int4": 4, "int8": 8, "ternary": 2, "codebook": 4}
BIAS = {"int4": 8, "int8": 0, "ternary": 1, "codebook": 0}  # of a code above its integer
ZERO = {**quantised.ZERO}  # of a code of ``values.encode`` above its integer


def places(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Word of a lane and lowest bit in it of the code (j, H, h, p, v), both [128] in that order."""
    q, h, p, v = torch.meshgrid(torch.arange(16), *[torch.arange(2)] * 3, indexing="ij")
    word, bit = {
        "int4": (q, 16 * v + 8 * p + 4 * h),
        "int8": (2 * q + p, 16 * v + 8 * h),
        "ternary": (q // 2, 16 * v + 8 * (q % 2) + 4 * p + 2 * h),
        "codebook": (q, 16 * h + 8 * p + 4 * v),
    }[kind]
    return word.flatten(), bit.flatten()


def code_words(integers: torch.Tensor, kind: str) -> torch.Tensor:
    """int32 [n, k, load, g, t, 4] of integers [16 n, 256 k]."""
    n, k = len(integers) // ROWS, integers.shape[1] // COLUMNS
    axes = (integers.long() + BIAS[kind]).view(n, 2, 8, k, 8, 4, 2, 2, 2)  # n h g k j t H p v
    lane = axes.permute(0, 3, 2, 5, 4, 6, 1, 7, 8).reshape(n, k, 8, 4, 128)  # n k g t (j H h p v)
    word, bit = (x.to(integers.device) for x in places(kind))
    codes = (lane & (1 << BITS[kind]) - 1) << bit
    words = codes.new_zeros(n, k, 8, 4, 4 * BITS[kind]).index_add_(4, word, codes)
    return words.to(torch.int32).view(n, k, 8, 4, BITS[kind], 4).permute(0, 1, 4, 2, 3, 5).contiguous()


def integers_back(words: torch.Tensor, kind: str) -> torch.Tensor:
    """int64 [16 n, 256 k], the inverse of ``code_words``."""
    n, k = words.shape[:2]
    lane = words.permute(0, 1, 3, 4, 2, 5).flatten(4).long() & 0xFFFFFFFF
    word, bit = (x.to(words.device) for x in places(kind))
    codes = (lane[..., word] >> bit & (1 << BITS[kind]) - 1) - BIAS[kind]
    if kind == "int8":
        codes = codes.to(torch.int8).long()
    return codes.view(n, k, 8, 4, 8, 2, 2, 2, 2).permute(0, 6, 2, 1, 4, 3, 5, 7, 8).reshape(n * ROWS, k * COLUMNS)


def quantise(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """Words, and scales: of rows [N], of groups [n, k, part, g, (group of two, h)], or bytes of levels [n, g, 4, 4].

    Raises PatternMismatch where the weight is off the grid, or groups have other than 32, 64 or 128 columns.
    """
    kind, group = value_kind(format.values)
    if group not in (0, 32, 64, 128):
        raise PatternMismatch(format=str(format), detail="groups have 32, 64 or 128 columns, or are whole rows")
    found = quantised.encode(weight, format)
    fill = (0, -weight.shape[1] % COLUMNS, 0, -weight.shape[0] % ROWS)
    words = code_words(torch.nn.functional.pad(found.codes - ZERO[kind], fill), kind)
    scale = found.scale
    if kind == "codebook":
        levels = torch.nn.functional.pad(scale, (0, 0, 0, fill[3])).contiguous().view(torch.uint8)
        return words, levels.view(-1, 2, 8, 16, 2).permute(0, 2, 1, 4, 3).contiguous().view(torch.int32)
    if not group:
        return words, scale.flatten().contiguous()
    each = COLUMNS // group
    padded = torch.nn.functional.pad(scale, (0, -scale.shape[1] % each, 0, fill[3]))
    return words, padded.view(len(words), 2, 8, -1, each // 2, 2).permute(0, 3, 4, 2, 5, 1).contiguous()


def dequantise(words: torch.Tensor, scale: torch.Tensor, format: Format, like: torch.Tensor) -> torch.Tensor:
    """The padded weight back."""
    kind, group = value_kind(format.values)
    q = integers_back(words, kind)
    if kind == "codebook":
        levels = scale.view(torch.uint8).view(-1, 8, 2, 2, 16).permute(0, 2, 1, 4, 3).contiguous().view(like.dtype)
        return levels.view(-1, 16).gather(1, q)
    if group:
        scale = scale.permute(0, 5, 3, 1, 2, 4).reshape(len(q), -1)
    else:
        scale = torch.nn.functional.pad(scale, (0, len(q) - len(scale)))[:, None]
    return OnGrid(q.to(torch.int8), scale.float(), group).weight(like.dtype)


def _grouped(x: torch.Tensor, keep: int) -> torch.Tensor:
    """[16 n, 256 k] as [n, h, g, k, groups in a lane's load order, t, 2 keep]."""
    return x.view(len(x) // ROWS, 2, 8, x.shape[1] // COLUMNS, 32 // keep, 4, 2 * keep)


def _slots(kept: torch.Tensor, keep: int) -> torch.Tensor:
    """Where the value of each position [.., 2 keep] lies: of the first half from 0 on, of the second from the end."""
    front, back = kept.long().split(keep, -1)
    behind = back.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([front.cumsum(-1) - 1, keep - behind], -1)


def sparse_words(weight: torch.Tensor, keep: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values int32 [n, k, load 8, g, t, 4] and bits int32 [n, k, g, t, 4] of a padded weight of ``keep`` : 2 keep."""
    groups = _grouped(weight, keep)
    kept = groups != 0
    slots = torch.where(kept, _slots(kept, keep), keep)
    values = groups.new_zeros(*groups.shape[:-1], keep + 1).scatter_(-1, slots, groups)[..., :keep]
    pairs = values.contiguous().view(torch.int32)  # n h g k i t pair
    order = (0, 3, 4, 2, 5, 1, 6) if keep == 4 else (0, 3, 4, 1, 2, 5, 6)
    n, k = groups.shape[0], groups.shape[3]
    values = pairs.permute(order).reshape(n, k, 8, 8, 4, 4)
    bytes_ = kept.view(n, 2, 8, k, 4, 8 // keep, 4, keep // 2, 4)  # n h g k word i t quad b
    bit = torch.arange(8, device=weight.device).view(8 // keep, 2, keep // 2)
    bit = bit[:, :, :, None] + 8 * torch.arange(4, device=weight.device)
    ordered = bytes_.permute(0, 3, 2, 6, 4, 5, 1, 7, 8).long()  # n k g t word i h quad b
    return values, (ordered << bit).flatten(5).sum(5).to(torch.int32)


def dense_back(values: torch.Tensor, bits: torch.Tensor, keep: int, like: torch.Tensor) -> torch.Tensor:
    """The padded weight of ``sparse_words``."""
    n, k = values.shape[:2]
    bit = torch.arange(8, device=bits.device).view(8 // keep, 2, keep // 2)
    bit = bit[:, :, :, None] + 8 * torch.arange(4, device=bits.device)
    kept = bits[..., None, None, None, None] >> bit & 1  # n k g t word i h quad b
    kept = kept.permute(0, 6, 2, 1, 4, 5, 3, 7, 8).reshape(n, 2, 8, k, 32 // keep, 4, 2 * keep).bool()
    if keep == 4:
        pairs = values.view(n, k, 8, 8, 4, 2, 2).permute(0, 5, 3, 1, 2, 4, 6)
    else:
        pairs = values.view(n, k, 4, 2, 8, 4, 4).permute(0, 3, 4, 1, 2, 5, 6)
    stored = pairs.contiguous().view(like.dtype)
    found = stored.gather(-1, torch.where(kept, _slots(kept, keep), 0))
    return torch.where(kept, found, 0).reshape(n * ROWS, k * COLUMNS)
