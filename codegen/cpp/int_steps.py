"""The layout "steps" (see ``int_steps.h``): 16 rows by 4 columns at a time, dense or with a bit for each position."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsec.codegen.cpp import int_codes, nm, packer
from sparsec.codegen.cpp.codes import BITS, SYMMETRIC_ZERO, Codes, codes_of
from sparsec.codegen.spec import Packed
from sparsec.formats import Format, Pattern, value_kind

Array = np.ndarray[Any, Any]

DTYPES = (torch.float32, torch.bfloat16)
STEP = 4  # columns
QUAD = 16  # columns of 4 steps, the unit of the kernel's loop


def kept_of(pattern: Pattern) -> int:
    """Codes in a step: 64 where there is no mask, 0 where a mask may keep any number."""
    if pattern.kind == "panel":
        return 64
    if pattern.kind == "nm" and STEP % pattern.params[1] == 0:
        n, m = pattern.params
        return 64 // m * n
    return 0


def on_tiles(format: Format) -> bool:
    """Whether the loop has AMX's tiles of int8."""
    return True


def constants(format: Format) -> dict[str, int | str]:
    return {"kPerStep": kept_of(format.pattern), "kSide": 16, "kXColumns": QUAD, "kXFlip": 0, "kSums": 1}


def pack(weight: torch.Tensor, format: Format, source_key: str) -> Packed:
    """Raises PatternMismatch where the weight is on no such grid, or is not N:M."""
    pattern, (kind, _) = format.pattern, value_kind(format.values)
    if pattern.kind == "nm":
        nm.check(weight, pattern)
    codes = codes_of(weight, format, source_key)
    n, k = weight.shape
    tiles, steps = -(-n // packer.TILE), -(-k // QUAD) * QUAD // STEP
    stored = _in_steps(codes.unsigned(), tiles, steps)
    kept = kept_of(pattern)
    if kept == 64:
        flat, masks = int_codes.planes(stored.reshape(-1, 64), BITS[kind]), np.zeros(0, dtype=np.int64)
        start = np.arange(tiles + 1) * (flat.size // max(tiles, 1))
    else:
        keep = _in_steps(codes.q != 0, tiles, steps)
        if kept:
            keep = _filled(keep, *pattern.params)
        flat, starts = int_codes.compress(stored[keep], keep.sum(2).ravel(), BITS[kind])
        start = starts[::steps].copy() if steps else np.zeros(tiles + 1, dtype=np.int64)
        masks = np.packbits(keep.reshape(-1, 64), axis=1, bitorder="little").view(np.int64).ravel()
    scale, zero, apart = factors(codes, SYMMETRIC_ZERO[kind], tiles)
    info = torch.tensor([DTYPES.index(weight.dtype), apart])
    tensors = (int_codes.padded(flat), torch.from_numpy(masks), torch.from_numpy(start), scale, zero, info)
    work = torch.from_numpy(start) + torch.arange(tiles + 1) * (steps * 16 + 64)
    return Packed(format, 1, tensors, work, (n, k), source_key, x="int8")


def factors(codes: Codes, middle: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(scales fp32, zeros uint8, bytes from the zeros of one group to the next), both [tile][group][16].

    Where every group has the same zero it is there once.
    """
    scale = _by_tile(codes.scale, tiles, 0.0)
    if codes.symmetric:
        return scale, codes.zero.flatten()[:1].repeat(packer.TILE), 0
    return scale, _by_tile(codes.zero, tiles, middle), packer.TILE


def _by_tile(values: torch.Tensor, tiles: int, rest: float) -> torch.Tensor:
    n, groups = values.shape
    wide = torch.full((tiles * packer.TILE, groups), rest, dtype=values.dtype)
    wide[:n] = values
    return wide.view(tiles, packer.TILE, groups).transpose(1, 2).contiguous().flatten()


def unpack(packed: Packed) -> torch.Tensor:
    """The weight back, in NumPy and from the layout's description alone."""
    if 0 in packed.shape:
        return torch.zeros(packed.shape, dtype=DTYPES[int(packed.tensors[-1][0])])
    (n, k), (kind, group) = packed.shape, value_kind(packed.format.values)
    flat, masks, start, scale, zero, info = packed.tensors
    tiles, steps, bits = -(-n // packer.TILE), -(-k // QUAD) * QUAD // STEP, BITS[kind]
    wide = np.zeros((tiles, steps, 64), dtype=np.uint8)
    if kept_of(packed.format.pattern) == 64:
        wide[:] = int_codes.from_planes(flat.numpy()[: int(start[-1])], bits).reshape(wide.shape)
        keep = np.ones(wide.shape, dtype=bool)
    else:
        keep = np.unpackbits(masks.numpy().view(np.uint8), bitorder="little").view(bool).reshape(wide.shape)
        wide[keep] = int_codes.decompress(flat.numpy(), keep.sum(2).ravel(), bits)
    scales, zeros = from_factors(scale, zero, tiles, n)
    span = np.repeat(zeros.numpy().astype(np.int16), group or max(k, 1), axis=1)[:, :k]
    q = np.where(_in_rows(keep, n, k), _in_rows(wide, n, k) - span, 0).astype(np.int8)
    return Codes(torch.from_numpy(q), scales, zeros, torch.zeros(n, 0), group).weight(DTYPES[int(info[0])])


def from_factors(scale: torch.Tensor, zero: torch.Tensor, tiles: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of ``factors``: scales [n, groups] and zeros alike."""
    groups = scale.numel() // (packer.TILE * max(tiles, 1))
    if zero.numel() == packer.TILE:
        zero = zero.repeat(tiles * groups)
    scales, zeros = (t.view(tiles, groups, packer.TILE).transpose(1, 2).reshape(-1, groups)[:n] for t in (scale, zero))
    return scales, zeros


def _in_steps(values: torch.Tensor, tiles: int, steps: int) -> Array:
    """[N, K] -> [tiles, steps, 64], zeros where the weight ends."""
    n, k = values.shape
    wide = torch.zeros(tiles * packer.TILE, steps * STEP, dtype=values.dtype)
    wide[:n, :k] = values
    order = wide.view(tiles, packer.TILE, steps, STEP).transpose(1, 2)
    out: Array = order.reshape(tiles, steps, 64).numpy()
    return out


def _in_rows(values: Array, n: int, k: int) -> Array:
    """The inverse of ``_in_steps``."""
    tiles, steps, _ = values.shape
    rows: Array = values.reshape(tiles, steps, packer.TILE, STEP).swapaxes(1, 2)
    return rows.reshape(tiles * packer.TILE, steps * STEP)[:n, :k]


def _filled(keep: Array, n: int, m: int) -> Array:
    """Exactly n of every m neighbours kept: the first of those that were not, too."""
    groups = keep.reshape(-1, m)
    missing = n - groups.sum(1, keepdims=True)
    more = ~groups & ((~groups).cumsum(1) <= missing)
    out: Array = (groups | more).reshape(keep.shape)
    return out
