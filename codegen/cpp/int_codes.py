"""Codes of 8, 4 or 2 bits in bytes: 64 of a step beside each other, or those that a mask keeps one after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sparsec.codegen.cpp import packer

Array = np.ndarray[Any, Any]


def padded(flat: Array) -> torch.Tensor:
    """The bytes with ``PAD_BYTES`` of zeros behind them."""
    out = packer.padded(flat.size, torch.uint8)
    out[: flat.size] = torch.from_numpy(flat)
    return out


def planes(steps: Array, bits: int) -> Array:
    """[steps, 64] -> bytes: 8 / bits steps share their 64 bytes, the first has the lowest bits."""
    together = 8 // bits
    parts = steps.reshape(-1, together, 64)
    out = parts[:, 0].copy()
    for i in range(1, together):
        out |= parts[:, i] << (bits * i)
    return out.ravel()


def from_planes(flat: Array, bits: int) -> Array:
    """The inverse of ``planes``."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, :, None]
    out: Array = ((flat.reshape(-1, 1, 64) >> shifts) & (2**bits - 1)).reshape(-1, 64)
    return out


def _places(counts: Array, bits: int) -> tuple[Array, Array]:
    """Where each code goes, in codes, if every run of ``counts`` codes begins with a byte; and where runs begin."""
    together = 8 // bits
    start = np.concatenate([[0], (-(-counts // together) * together).cumsum()]).astype(np.int64)
    shift = start[:-1] - (counts.cumsum() - counts)
    return np.arange(counts.sum()) + np.repeat(shift, counts), start


def compress(codes: Array, counts: Array, bits: int) -> tuple[Array, Array]:
    """(bytes, first byte of each run and one more) of runs of ``counts`` codes, each padded to whole bytes."""
    place, start = _places(counts, bits)
    wide = np.zeros(int(start[-1]), dtype=np.uint8)
    wide[place] = codes
    return in_bytes(wide, bits), start // (8 // bits)


def in_bytes(codes: Array, bits: int) -> Array:
    """Neighbours together, the first in the lowest bits; there are enough to fill the last byte."""
    together = 8 // bits
    flat = codes[::together].copy()
    for i in range(1, together):
        flat |= codes[i::together] << (bits * i)
    return flat


def from_bytes(flat: Array, bits: int) -> Array:
    """The inverse of ``in_bytes``."""
    out: Array = (flat[:, None] >> np.arange(0, 8, bits, dtype=np.uint8)) & (2**bits - 1)
    return out.ravel()


def decompress(flat: Array, counts: Array, bits: int) -> Array:
    """The codes that ``compress`` was given."""
    place, start = _places(counts, bits)
    out: Array = from_bytes(flat[: int(start[-1]) * bits // 8], bits)[place]
    return out
