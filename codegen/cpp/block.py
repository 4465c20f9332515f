"""Pattern ``block``: zeros come in R x C blocks. The blocks at the edges of a weight may be cut off.

Blocks whose R has a factor of two are sliced, with gcd(R, 16) rows sharing each column (16x1, 4x1, 16x16 ...). Blocks
of a multiple of 1 x 16 are runs of 16 columns. Anything else (1x4, 3x3) has no layout of its own: ``index``.
"""

from __future__ import annotations

import math

import torch

from sparsec.codegen.cpp import coded, packer, sliced
from sparsec.codegen.cpp.compose import unit
from sparsec.codegen.cpp.values import bits, is_coded
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.formats import Format, Pattern

RUN = 16


def _layout(pattern: Pattern) -> tuple[str, int]:
    rows, cols = pattern.params
    share = math.gcd(rows, 16)
    if share == 1 and cols % RUN == 0:
        return "rows", 1
    return "sliced", share


def _pack_rows(weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
    tail: tuple[torch.Tensor, ...] = ()
    if is_coded(values):
        found = coded.coded(weight, Format(pattern, values), "rows", source_key)
        weight, tail, numbers = found.stored, found.tail, found.main
    else:
        weight = numbers = packer.checked(weight, values)
    n, k = weight.shape
    tiles, runs = -(-n // packer.TILE), -(-k // RUN)
    wide, kept = (
        torch.nn.functional.pad(t, (0, runs * RUN - k, 0, tiles * packer.TILE - n)).view(tiles * packer.TILE, runs, RUN)
        for t in (weight, numbers != 0)
    )
    kept = kept.any(2)
    data = wide[kept].view(-1)
    if tail:
        data = coded.to_bytes(data, bits(values))
    stored = packer.padded(data.numel(), data.dtype)
    stored[: data.numel()] = data
    start = packer.prefix(kept.sum(1))
    work = RUN * start[:: packer.TILE] + torch.arange(tiles + 1) * 64
    run = kept.nonzero()[:, 1].to(torch.int32)
    return Packed(Format(pattern, values), 1, (stored, run, start, *tail), work, (n, k), source_key)


def _unpack_rows(packed: Packed) -> torch.Tensor:
    stored, run, start, *tail = packed.tensors
    values = packed.format.values
    if tail:
        stored = coded.from_bytes(stored[: run.numel() * RUN * bits(values) // 8], bits(values))
    n, k = packed.shape
    runs = -(-k // RUN)
    row = torch.repeat_interleave(torch.arange(start.numel() - 1), start.diff())
    wide = torch.zeros(start.numel() - 1, runs, RUN, dtype=stored.dtype)
    wide[row, run.long()] = stored[: run.numel() * RUN].view(-1, RUN)
    dense = wide.view(start.numel() - 1, runs * RUN)[:n, :k].contiguous()
    if not tail:
        return dense
    kept = torch.zeros(start.numel() - 1, runs, dtype=torch.bool)
    kept[row, run.long()] = True
    return coded.decoded(dense, kept.repeat_interleave(RUN, 1)[:n, :k], tuple(tail), values)


class Block:
    kind = "block"
    loops = ("dot", "outer")

    def pack(self, weight: torch.Tensor, pattern: Pattern, values: str, source_key: str) -> Packed:
        layout, share = _layout(pattern)
        if layout == "rows":
            return _pack_rows(weight, pattern, values, source_key)
        return sliced.pack(weight, pattern, values, source_key, share)

    def unpack(self, packed: Packed) -> torch.Tensor:
        layout, share = _layout(packed.format.pattern)
        return _unpack_rows(packed) if layout == "rows" else sliced.unpack(packed, share)

    def text(self, spec: KernelSpec) -> str:
        layout, share = _layout(spec.format.pattern)
        return unit(spec, "rows", {}) if layout == "rows" else sliced.text(spec, share)


FAMILY = Block()
