"""The layout "words" (see ``words.h``): codes of every position, for the pattern ``panel``."""

from __future__ import annotations

import torch

from sparsec.codegen.cpp import coded, packer
from sparsec.codegen.cpp.values import bits
from sparsec.codegen.spec import Packed
from sparsec.formats import Format


def pack(weight: torch.Tensor, format: Format, source_key: str, together: int = packer.GROUP) -> Packed:
    """``together``: rows that are read side by side; 1 in ``row_words.h``."""
    found = coded.coded(weight, format, "words", source_key)
    (n, k), width = weight.shape, bits(format.values)
    wide = torch.nn.functional.pad(found.stored, (0, -k % packer.CHUNK, 0, -n % packer.TILE))
    parts = wide.view(wide.shape[0] // together, together, wide.shape[1] // packer.CHUNK, packer.CHUNK).transpose(1, 2)
    stream = coded.to_bytes(elements(parts, width), width).flatten()
    data = packer.padded(stream.numel(), torch.uint8)
    data[: stream.numel()] = stream
    work = torch.arange(wide.shape[0] // packer.TILE + 1) * (packer.TILE * wide.shape[1] + 1)
    return Packed(format, 1, (data, *found.tail), work, (n, k), source_key)


def elements(parts: torch.Tensor, width: int) -> torch.Tensor:
    """[..., 128]: the codes of an element follow each other, where it has four in a byte or two."""
    return parts if width in (3, 8) else parts.reshape(*parts.shape[:-1], 4, 32).transpose(-1, -2).flatten(-2)


def from_elements(codes: torch.Tensor, width: int) -> torch.Tensor:
    """The inverse of ``elements``."""
    return codes if width in (3, 8) else codes.reshape(*codes.shape[:-1], 32, 4).transpose(-1, -2).flatten(-2)


def unpack(packed: Packed, together: int = packer.GROUP) -> torch.Tensor:
    data, *tail = packed.tensors
    (n, k), width = packed.shape, bits(packed.format.values)
    rows, chunks = -(-n // packer.TILE) * packer.TILE, -(-k // packer.CHUNK)
    size = packer.CHUNK * width // 8
    codes = coded.from_bytes(data[: rows * chunks * size].view(rows // together, chunks, together, size), width)
    codes = from_elements(codes, width)
    stored = codes.transpose(1, 2).reshape(rows, chunks * packer.CHUNK)[:n, :k].contiguous()
    return coded.decoded(stored, None, tuple(tail), packed.format.values)
