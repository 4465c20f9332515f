"""``mma.sp``, ``mma`` and the instructions around them, from registers by NumPy: what assembly of a kernel means.

The maps are written down once more from the PTX ISA ("Matrix fragments for sparse mma.m16n8k32 with .f16 and .bf16
types", and "Sparse matrix storage" for the metadata), in its own terms and by lane and element, so that they share
nothing with the packer. The lanes of the metadata, which the ISA gives as pictures, agree with ``ELayout`` of
``MMA_Traits<SM80_SPARSE_16x8x32_...>`` in CUTLASS.

Registers are uint32 [warps, 32 lanes].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

Registers = Any  # np.ndarray, uint32 [warps, 32]
LANE = np.arange(32)
GROUP, THREAD = LANE >> 2, LANE % 4  # groupID and threadID_in_group


def execute(text: str, inputs: Sequence[Any], outputs: int = 4) -> Any:
    """Run one piece of assembly for whole warps. inputs: uint32 [warps, 32, registers] each; returns the outputs so."""
    registers: dict[str, Any] = {}
    flat = [array[:, :, r] for array in inputs for r in range(array.shape[2])]
    for number, value in enumerate(flat):
        registers[f"${outputs + number}"] = value
    for statement in text.strip("{} ").split(";") if not text.startswith("mma") else [text.rstrip(";")]:
        words = statement.strip()
        if words and not words.startswith(".reg"):
            name, _, rest = words.partition(" ")
            operands = re.findall(r"[$\w]+", rest)
            _execute(name, operands, registers, flat[0].shape)
    return np.stack([registers[f"${r}"] for r in range(outputs)], 2)


def _execute(name: str, operands: list[str], registers: dict[str, Any], shape: tuple[int, ...]) -> None:
    if name.startswith("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32"):
        a, b, c = ([registers[o] for o in operands[at : at + 4]] for at in (4, 8, 12))
        made = mma_sp(a, b, c, registers[operands[16]], int(operands[17], 16), "bf16" not in name)
        registers.update(zip(operands[:4], made, strict=True))
        return
    if name.startswith("mma.sync.aligned.m16n8k16.row.col.f32"):
        a, b, c = ([registers[o] for o in operands[first:last]] for first, last in ((4, 8), (8, 10), (10, 14)))
        registers.update(zip(operands[:4], mma(a, b, c, "bf16" not in name), strict=True))
        return
    values = [
        registers[o] if o in registers else np.full(shape, int(o, 0), dtype=np.uint32) for o in operands[1:]
    ]  # fmt: skip
    registers[operands[0]] = _simple(name, values)


def _simple(name: str, v: list[Registers]) -> Registers:
    if name == "mov.b32":
        return v[0]
    two = {
        "shr.b32": np.right_shift, "shl.b32": np.left_shift, "and.b32": np.bitwise_and, "xor.b32": np.bitwise_xor
    }  # fmt: skip
    if name in two:
        return two[name](*v)
    if name in ("mad.lo.u32", "mad.hi.u32", "mul.hi.u32"):
        product = v[0].astype(np.uint64) * v[1].astype(np.uint64) >> np.uint64(32 * (".hi" in name))
        return (product + (v[2] if len(v) > 2 else np.uint64(0))).astype(np.uint32)
    if name == "dp4a.u32.u32":
        return v[2] + sum((v[0] >> at & 255) * (v[1] >> at & 255) for at in map(np.uint32, (0, 8, 16, 24)))
    if name == "prmt.b32":
        return _permuted(*v)
    if name == "lop3.b32":
        table, out = int(v[3].flat[0]), np.zeros_like(v[0])
        for case in range(8):
            parts = [x if case >> (2 - i) & 1 else ~x for i, x in enumerate(v[:3])]
            out |= (parts[0] & parts[1] & parts[2]) * np.uint32(table >> case & 1)
        return out
    if name == "fma.rn.f32":
        a, b, c = (x.view(np.float32).astype(np.float64) for x in v)
        return (a * b + c).astype(np.float32).view(np.uint32)
    if name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
        half = name.endswith(".f16x2")
        a, b, c = (_halves(x, half) for x in v)
        made = a * b + c
        bits = made.astype(np.float16).view(np.uint16) if half else made.astype(np.float32).view(np.uint32) >> 16
        exact = bits.astype(np.uint16).view(np.float16) if half else (bits << 16).view(np.float32)
        assert (exact == made).all(), "only exact results are modelled: there is no rounding here"
        return (bits[..., 0] | (bits[..., 1].astype(np.uint32) << 16)).astype(np.uint32)
    raise NotImplementedError(name)


def _permuted(a: Registers, b: Registers, selector: Registers) -> Registers:
    """Four bytes of the eight of b:a, by nibbles; the highest bit of a nibble says to repeat the byte's highest bit."""
    eight = np.stack([x >> np.uint32(at) & 255 for x in (a, b) for at in (0, 8, 16, 24)], -1)
    made = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & 15
        byte = np.take_along_axis(eight, (nibble & 7)[..., None].astype(np.int64), -1)[..., 0]
        made |= np.where(nibble & 8, (byte >> 7) * 255, byte).astype(np.uint32) << np.uint32(8 * i)
    return made


def mma(a: list[Registers], b: list[Registers], c: list[Registers], half: bool) -> list[Registers]:
    """d of ``mma.m16n8k16``, by "Matrix Fragments for mma.m16n8k16 with floating point type"."""
    warps = a[0].shape[0]
    weight, x = np.zeros((warps, 16, 16)), np.zeros((warps, 16, 8))
    for i in range(8):  # a0 .. a7
        row = GROUP + 8 * (i // 2 % 2)
        weight[:, row, THREAD * 2 + i % 2 + 8 * (i >= 4)] = _halves(a[i // 2], half)[..., i % 2]
    for i in range(4):  # b0 .. b3
        x[:, THREAD * 2 + i % 2 + 8 * (i >= 2), GROUP] = _halves(b[i // 2], half)[..., i % 2]
    return _accumulated(weight @ x, c)


def _accumulated(product: Any, c: list[Registers]) -> list[Registers]:
    """product [warps, 16, 8] plus c, as registers."""
    return [
        (product[:, GROUP + 8 * (i >= 2), THREAD * 2 + i % 2] + c[i].view(np.float32))
        .astype(np.float32)
        .view(np.uint32)
        for i in range(4)
    ]


def _halves(x: Registers, half: bool) -> Any:
    """float64 [..., 2]: the lower and the upper 16 bits as fp16 or bf16."""
    bits = np.stack([x & 0xFFFF, x >> 16], -1)
    return (bits.astype(np.uint16).view(np.float16) if half else (bits << 16).view(np.float32)).astype(np.float64)


def mma_sp(a: list[Registers], b: list[Registers], c: list[Registers], e: Registers, selector: int, half: bool) -> Any:
    """d: four uint32 [warps, 32] with fp32 in them."""
    warps = e.shape[0]
    weight, x = np.zeros((warps, 16, 32)), np.zeros((warps, 32, 8))
    for i in range(8):  # a0 .. a7
        row = GROUP if i in (0, 1, 4, 5) else GROUP + 8
        first = THREAD * 4 + (0 if i < 4 else 16)
        index = _index(e, row, first, selector, i % 2)
        assert i % 2 == 0 or (index > _index(e, row, first, selector, 0)).all(), "metadata is not in order"
        values = _halves(a[i // 2], half)[..., i % 2]
        weight[np.arange(warps)[:, None], row, first + index] = values
    for i in range(8):  # b0 .. b7
        x[:, (i // 2) * 8 + THREAD * 2 + i % 2, GROUP] = _halves(b[i // 2], half)[..., i % 2]
    return _accumulated(weight @ x, c)


def _index(e: Registers, row: Any, first: Any, selector: int, which: int) -> Any:
    """Where in its chunk of four, from column ``first``, kept value ``which`` of ``row`` stands; [warps, lanes]."""
    lane = row % 8 * 4 + selector * 2 + first // 16
    shift = row // 8 * 16 + first % 16 // 4 * 4 + which * 2
    return (e[:, lane] >> shift.astype(np.uint32) & 3).astype(np.int64)


def mma_sp_e4m3(a: list[Registers], b: list[Registers], c: list[Registers], e: Registers) -> list[Registers]:
    """d of ``mma.sp.m16n8k64`` with e4m3: four uint32 [warps, 32] with fp32 in them.

    PTX ISA, "Matrix fragments for sparse mma.m16n8k64 with .u8 / .s8 / .e4m3 / .e5m2 type". The picture of the metadata
    agrees with ``ELayout`` of ``SM120_SPARSE_16x8x64_TN`` in CUTLASS: bit 0 of a lane is eight rows, bit 1 32 columns.
    """
    warps = e.shape[0]
    weight, x = np.zeros((warps, 16, 64)), np.zeros((warps, 64, 8))
    before = np.zeros((warps, 32), np.int64)
    for i in range(16):  # a0 .. a15
        row = GROUP if i % 8 < 4 else GROUP + 8
        first = THREAD * 8 + (0 if i < 8 else 32) + i % 4 // 2 * 4
        lane = row % 8 * 4 + first // 32 * 2 + row // 8
        shift = (first % 32 + i % 2 * 2).astype(np.uint32)
        index = (e[:, lane] >> shift & 3).astype(np.int64)
        if i % 2:
            assert (index > before).all(), "metadata is not in order"
        before = index
        weight[np.arange(warps)[:, None], row, first + index] = _e4m3(a[i // 4] >> np.uint32(i % 4 * 8) & 255)
    for i in range(16):  # b0 .. b15
        x[:, i // 4 * 16 + THREAD * 4 + i % 4, GROUP] = _e4m3(b[i // 4] >> np.uint32(i % 4 * 8) & 255)
    product = weight @ x
    return [
        (product[:, GROUP + 8 * (i >= 2), THREAD * 2 + i % 2] + c[i].view(np.float32))
        .astype(np.float32)
        .view(np.uint32)
        for i in range(4)
    ]


def _e4m3(code: Registers) -> Any:
    """float64 of codes: sign, four bits of exponent with bias 7, three of mantissa; no infinities."""
    exponent, mantissa = (code >> 3 & 15).astype(int), (code & 7).astype(float)
    size = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    return np.where(code & 127 == 127, np.nan, np.where(code & 128, -size, size))
