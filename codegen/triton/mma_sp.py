"""``mma.sp``: 16 x 32 weights of 2:4 times 32 x 8 inputs by one instruction of a warp, and the decoders that feed it.

Tensors are flat, [warps * 128]: element (warp * 32 + lane) * 4 + r is register r of that lane, so that inline assembly
with four elements a call sees the registers of one lane. The maps are those of the PTX ISA, "Matrix fragments for
sparse mma.m16n8k32 with .f16 and .bf16 types" (9.7.14.6.2.2 in PTX 8 and 9); with g = lane // 4 and t = lane % 4:

  a  register 2q + h: the two kept values of row g + 8h, columns 16q + 4t .. + 3      low half: the left one
  b  register r: rows 8r + 2t and + 1 of column g
  d  register 2h + c: row g + 8h, column 2t + c
  e  lanes with t = 2s + q hold, for selector s, the columns 16q .. 16q + 15: nibble t' of half h is row g + 8h, columns
     16q + 4t' .. + 3, as (first | second << 2) with first < second ("ordered metadata")

So one word of metadata serves two k-tiles (s = 0, 1), and the four words of a 16-byte load serve eight; k-tile j of a
step of eight takes word j // 2 and selector j % 2.

Every piece of assembly has a twin in Triton's language which computes from the very same registers: that is what the
interpreter runs, where there is no assembly.
"""

from __future__ import annotations

import triton
import triton.language as tl

TILES = 8  # k-tiles of 32 columns in a step: what one 16-byte load of metadata serves
MMA_CONSTRAINTS = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4 + ["r"] * 4))
DECODE_CONSTRAINTS = tl.constexpr(
    ",".join(["=&r"] * 4 + ["r"] * 4)
)  # written before all inputs are read: early clobber
FOLD_CONSTRAINTS = tl.constexpr(",".join(["=&f"] * 4 + ["f"] * 12))


@triton.constexpr_function
def mma_text(tile: int, half: bool) -> str:
    """d = a * b + c for k-tile ``tile`` of a step. Operands: d, a, b, c, and the four words of metadata."""
    kind = "f16" if half else "bf16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{$8,$9,$10,$11}},{{$12,$13,$14,$15}},${16 + tile // 2},0x{tile % 2};"
    )


@triton.constexpr_function
def decode_text(tile: int, bits: int, half: bool) -> str:
    """Registers a of k-tile ``tile`` from four words of integers, without a conversion instruction.

    A number of few bits in the low mantissa of 128 (bf16) or 1024 (fp16) is that number plus 128 or 1024, so the
    difference is exact. Seven bits fit below 128: the sign of an int8 picks what is taken away, 128 or 256.
    """
    kind, one = ("f16x2", "0x3C003C00") if half else ("bf16x2", "0x3F803F80")
    lines = [".reg .b32 x, lo, off, one;", f"mov.b32 one, {one};"]
    if bits == 4:
        lines.append(f"mov.b32 off, {'0xE408E408' if half else '0xC308C308'};")  # -(1024 + 8), -(128 + 8)
    elif half:
        lines.append("mov.b32 off, 0xE480E480;")  # -(1024 + 128)
    for r in range(4):
        word = 4 + (tile % 4 if bits == 4 else tile % 2 * 2 + r // 2)
        lines.append(f"shr.b32 x, ${word}, {4 * r if bits == 4 else r % 2 * 8};")
        if bits == 4:
            lines.append(f"lop3.b32 lo, x, 0x000F000F, {'0x64006400' if half else '0x43004300'}, 0xEA;")  # (a & b) | c
        elif half:
            lines.append("lop3.b32 lo, x, 0x00FF00FF, 0x64806480, 0x6A;")  # (a & b) ^ c: 1024 + (q + 128)
        else:
            lines.append("lop3.b32 lo, x, 0x007F007F, 0x43004300, 0xEA;")
            lines.append("lop3.b32 off, x, 0x00800080, 0xC300C300, 0xEA;")
        lines.append(f"fma.rn.{kind} ${r}, lo, one, off;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def fold_text(group: int) -> str:
    """d = part * scale + c, in fp32. Operands: d, c, part, and four scales: of group 0 in rows g, g + 8, of group 1."""
    return " ".join(f"fma.rn.f32 ${r}, ${8 + r}, ${12 + 2 * group + r // 2}, ${4 + r};" for r in range(4))


@triton.jit
def mma(a, b, acc, meta, J: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """acc + A @ B of k-tile ``J`` of a step."""
    if ASM:
        text: tl.constexpr = mma_text(J, HALF)
        return tl.inline_asm_elementwise(
            text, MMA_CONSTRAINTS, [a, b, acc, meta], dtype=tl.float32, is_pure=True, pack=4
        )  # fmt: skip
    else:
        return mma_twin(a, b, acc, meta, J, HALF)


@triton.jit
def decode(words, J: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Registers a of k-tile ``J`` from the load of ``BITS``-bit integers that holds it."""
    if ASM:
        text: tl.constexpr = decode_text(J, BITS, HALF)
        return tl.inline_asm_elementwise(text, DECODE_CONSTRAINTS, [words], dtype=tl.int32, is_pure=True, pack=4)
    else:
        return decode_twin(words, J, BITS, HALF)


@triton.jit
def fold(acc, part, scale, U: tl.constexpr, ASM: tl.constexpr):
    """acc + part * (scale of group ``U`` of the step)."""
    if ASM:
        text: tl.constexpr = fold_text(U)
        return tl.inline_asm_elementwise(
            text, FOLD_CONSTRAINTS, [acc, part, scale], dtype=tl.float32, is_pure=True, pack=4
        )  # fmt: skip
    else:
        r = tl.arange(0, 4)[None, :]
        return acc + part * tl.reshape(_word(scale, U * 2 + r // 2), acc.shape)


@triton.jit
def _word(words, which):
    """[lanes, 4]: of the four registers of each lane, the one that ``which`` [1, 4] names for each result register."""
    four = tl.reshape(words, (words.shape[0] // 4, 1, 4))
    return tl.sum(tl.where(which[:, :, None] == tl.arange(0, 4)[None, None, :], four, 0), 2)


@triton.jit
def _number(bits, HALF: tl.constexpr):
    """fp32 of the low 16 bits of an int32."""
    if HALF:
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return (bits << 16).to(tl.float32, bitcast=True)


@triton.jit
def _bits(number, HALF: tl.constexpr):
    """The 16 bits of a small integer as fp16 or bf16, in an int32."""
    if HALF:
        return number.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    else:
        return (number.to(tl.float32).to(tl.int32, bitcast=True) >> 16) & 0xFFFF


@triton.jit
def decode_twin(words, J: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr):
    r = tl.arange(0, 4)[None, :]
    if BITS == 8:
        word, at = _word(words, J % 2 * 2 + r // 2), r % 2 * 8
        low, high = (word << (24 - at)) >> 24, (word << (8 - at)) >> 24
    else:
        word, at = _word(words, J % 4 + r * 0), r * 4
        low, high = ((word >> at) & 15) - 8, ((word >> (at + 16)) & 15) - 8
    return tl.reshape(_bits(low, HALF) | (_bits(high, HALF) << 16), words.shape)


@triton.jit
def mma_twin(a, b, acc, meta, J: tl.constexpr, HALF: tl.constexpr):
    """Expands the 2:4 registers to rows of 32, gathers the columns of b, and multiplies."""
    WARPS: tl.constexpr = acc.shape[0] // 128
    word = tl.arange(0, 4)[None, None, None, :]
    selector = tl.arange(0, 2)[None, :, None, None]
    four = tl.reshape(meta, (WARPS * 8, 2, 2, 4))  # row, selector, q, word
    chosen = tl.sum(tl.sum(tl.where((word == J // 2) & (selector == J % 2), four, 0), 3), 1)
    shift = 4 * tl.arange(0, 4)[None, :, None, None] + 16 * tl.arange(0, 2)[None, None, None, :]
    nibble = (chosen[:, None, :, None] >> shift) & 15  # row, t, q, h
    pair = tl.reshape(a, (WARPS * 8, 4, 2, 2))
    at = tl.arange(0, 4)[None, None, None, None, :]
    first = tl.where((nibble & 3)[:, :, :, :, None] == at, _number(pair, HALF)[:, :, :, :, None], 0.0)
    second = tl.where((nibble >> 2)[:, :, :, :, None] == at, _number(pair >> 16, HALF)[:, :, :, :, None], 0.0)
    weight = tl.reshape(tl.permute(first + second, (0, 3, 2, 1, 4)), (WARPS, 8, 2, 1, 32))  # warp, g, h, -, column
    x = tl.reshape(b, (WARPS, 8, 4, 4))
    x = tl.permute(tl.join(_number(x, HALF), _number(x >> 16, HALF)), (0, 1, 3, 2, 4))
    x = tl.reshape(x, (WARPS, 1, 1, 8, 32))
    product = tl.reshape(tl.sum(weight * x, 4), (WARPS, 8, 2, 4, 2))
    return acc + tl.reshape(tl.permute(product, (0, 1, 3, 2, 4)), acc.shape)
