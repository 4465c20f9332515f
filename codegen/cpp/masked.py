"""Vectors of a weight one after the other, each as masks and the values that they keep: rows or parts of columns.

The layouts "columns_bitmap" and "row_bitmap" read them: a vector of L places is L / 32 masks (uint32) and then its kept
values, where codes of each 32 places start in a new byte; vectors begin at multiples of 4 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from sparsec.codegen.cpp import coded, packer
from sparsec.codegen.cpp.values import bits, is_coded, width
from sparsec.codegen.spec import Packed
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

MOST_BYTES = 4 * (2**31 - 1)  # what a start can point to
READ_PAST = 192  # bytes that a kernel may read behind the last


def stored(
    weight: torch.Tensor, format: Format, layout: str, key: str
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """What a layout stores of a weight [N, K], numbers or codes; bool where they are kept; the tensors that say what
    codes mean. Raises as ``coded.coded``, or ValueError for another dtype than the format's."""
    if is_coded(format.values):
        found = coded.coded(weight, format, layout, key)
        return found.stored, found.main != 0, found.tail
    whole = packer.checked(weight, format.values)
    return whole, whole != 0, ()


def pack(
    pieces: Iterable[tuple[torch.Tensor, torch.Tensor]], format: Format
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(bytes, starts int32 [vectors + 1] in units of 4) and the bytes of each piece.

    ``pieces``: values or stored codes, and bool where they are kept, both [vectors, L] with L a multiple of 32.
    Raises PatternMismatch for more than 8 GB.
    """
    found = [_bytes(values, kept, format.values) for values, kept in pieces]
    lengths = torch.cat([torch.zeros(0, dtype=torch.int64), *(length for _, length in found)])
    total = int(lengths.sum())
    if total > MOST_BYTES:
        raise PatternMismatch(format=str(format), detail="more than 8 GB of kept values")
    data = torch.zeros(total + READ_PAST, dtype=torch.uint8)
    torch.cat([data[:0], *(stored for stored, _ in found)], out=data[:total])
    sizes = torch.tensor([len(stored) for stored, _ in found], dtype=torch.int64)
    return (data, (packer.prefix(lengths) // 4).to(torch.int32)), sizes


def _bytes(values: torch.Tensor, kept: torch.Tensor, stored_as: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The bytes of one piece, and how many each of its vectors has."""
    head = kept.shape[1] // 8
    counts = kept.view(len(kept), kept.shape[1] // 32, 32).sum(2)
    if is_coded(stored_as):
        stream, sizes = coded.ragged(values[kept], counts.flatten(), 32, bits(stored_as))
        stream, sizes = stream[: int(sizes.sum())], sizes.view(counts.shape)
    else:
        stream, sizes = values[kept].view(torch.uint8), counts * (width(stored_as) // 8)
    used = sizes.sum(1)
    lengths = (head + used + 3) // 4 * 4
    starts = packer.prefix(lengths)
    out = torch.zeros(int(starts[-1]), dtype=torch.uint8)
    masks = torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))
    out[starts[:-1, None] + torch.arange(head)] = masks
    first = starts[:-1] + head - packer.prefix(used)[:-1]
    out[first.repeat_interleave(used) + torch.arange(len(stream))] = stream
    return out, lengths


def unpack(packed: Packed, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values (0 where none is kept) or stored codes, and bool where they are kept: [vectors, length] each."""
    values, head = packed.format.values, length // 8
    data, start = packed.tensors[0], packed.tensors[1].to(torch.int64) * 4
    masks = data[start[:-1, None] + torch.arange(head)].numpy()
    kept = torch.from_numpy(np.unpackbits(masks, axis=1, bitorder="little").view(bool))
    counts = kept.view(len(kept), kept.shape[1] // 32, 32).sum(2)
    used = ((counts * width(values) + 7) // 8).sum(1)
    first = start[:-1] + head - packer.prefix(used)[:-1]
    stream = data[first.repeat_interleave(used) + torch.arange(int(used.sum()))]
    if is_coded(values):
        found = coded.unragged(stream, counts.flatten(), 32, bits(values))
    else:
        found = stream.view(packer.VALUE_DTYPES[values])
    whole = torch.zeros(kept.shape, dtype=found.dtype)
    whole[kept] = found
    return whole, kept
