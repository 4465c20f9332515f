"""``mma.m16n8k16``: 16 x 16 weights times 16 x 8 inputs, twice for a k-tile of 32 columns, and what decodes weights.

Tensors are flat, [warps * 128], as in ``mma_sp``: element (warp * 32 + lane) * 4 + r is register r of that lane, with
g = lane // 4 and t = lane % 4. The order of columns in a product is free as long as both operands have it, so a lane
gets eight *neighbours* of each k-tile, which is one 16-byte load of x and one octet of a pattern:

  a  product H (0, 1), register 2p + h: columns 8t + 4H + 2p and + 1 of row g + 8h
  b  register 2H + p: columns 8t + 4H + 2p and + 1 of row g of x (its low half is the left one)
  d  register 2h + c: row g + 8h of the weight, row 2t + c of x

Number q = 2j + H of a product, of 16 in a step of eight k-tiles. Decoders make a from words of a lane:

  ``ternary``   half v of word (q % 8) / 2 has q + 1 of register r at bit 2 (4 (q % 2) + r). Bits put below the leading
                one of 128, 32 or 8 are that number plus the code, so one "and or" and one subtraction make two weights.
  ``levels``    nibble 4h + 2p + v of word q % 4 selects one of the 16 levels of row g + 8h. Their low and high bytes
                lie in four registers each, and a permutation looks four bytes up in two registers: eight permutations
                and a few "and or" for four weights, where loads would need an address for each.
  ``octets``    4:8 and 8:16. One bit a position, position b of four in byte b, so that one multiplication counts what
                is kept before each of the four, and gives the very selector by which a permutation takes their values
                from two registers. Of a group the first half counts from its first value on, the second half from
                its last value back, so neither waits for the other. The same bits, repeated, clear what is not kept.

Every piece of assembly has a twin in Triton's language which computes from the very same registers.
"""

# mypy: disable-error-code="assignment"
from __future__ import annotations

import triton
import triton.language as tl

from sparsec.codegen.triton.mma_sp import _bits, _number, _word

MMA = tl.constexpr(",".join(["=f"] * 4 + ["r"] * 8 + ["f"] * 4))
FROM_4, FROM_8, FROM_12, FROM_20 = (
    tl.constexpr(",".join(["=&r"] * 4 + ["r"] * inputs)) for inputs in (4, 8, 12, 20)
)  # written before all inputs are read: early clobber


@triton.constexpr_function
def mma16_text(h: int, half: bool) -> str:
    """d = a * b + c for product ``h`` of a k-tile. Operands: d, a, b, c."""
    kind = "f16" if half else "bf16"
    return (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        f"{{$0,$1,$2,$3}},{{$4,$5,$6,$7}},{{${8 + 2 * h},${9 + 2 * h}}},{{$12,$13,$14,$15}};"
    )


@triton.constexpr_function
def ternary_text(q: int, half: bool) -> str:
    """Registers a of product ``q`` from a load of words."""
    kind, one, unit, step = ("f16x2", 0x3C00, 0x6400, 0x0400) if half else ("bf16x2", 0x3F80, 0x4300, 0x0080)
    word = f"${4 + q % 8 // 2}"
    lines = [".reg .b32 x, off, one;", f"mov.b32 one, {one * 0x10001:#010x};"]
    for r in range(4):
        shift, at = divmod(q % 2 * 4 + r, 3)
        base = unit - 2 * at * step  # the bits of 128 / 4^at, or 1024 / 4^at: its step is one at bit 2 at
        off = 0x8000 | base + (1 << 2 * at)  # the negative of that number and one
        if shift:
            lines.append(f"shr.b32 x, {word}, {6 * shift};")
        source = "x" if shift else word
        lines.append(f"lop3.b32 x, {source}, {(3 << 2 * at) * 0x10001:#010x}, {base * 0x10001:#010x}, 0xEA;")
        lines.append(f"mov.b32 off, {off * 0x10001:#010x};")
        lines.append(f"fma.rn.{kind} ${r}, x, one, off;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def levels_text(q: int) -> str:
    """Registers a of product ``q`` from words and from low and high bytes of the levels of rows g and g + 8."""
    lines = [".reg .b32 i, s, x, y, l, h;", f"and.b32 i, ${4 + q % 4}, 0x77777777;", f"shr.b32 s, ${4 + q % 4}, 1;"]
    lines.append("lop3.b32 s, s, 0x44444444, 0x32103210, 0xEA;")  # byte k of the lower or of the upper eight
    for row in range(2):
        if row:
            lines += ["shr.b32 i, i, 16;", "shr.b32 s, s, 16;"]
        for part, at in (("l", 8 + 8 * row), ("h", 12 + 8 * row)):
            lines.append(f"prmt.b32 x, ${at}, ${at + 1}, i;")
            lines.append(f"prmt.b32 y, ${at + 2}, ${at + 3}, i;")
            lines.append(f"prmt.b32 {part}, x, y, s;")
        lines.append(f"prmt.b32 ${row}, l, h, 0x5140;")
        lines.append(f"prmt.b32 ${2 + row}, l, h, 0x7362;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def octets_text(q: int, keep: int) -> str:
    """Registers a of product ``q`` from values and bits. Operands: a, values (of each row if ``keep`` is 8), bits."""
    quad, bits = (q % 4, f"${12 + q // 4}") if keep == 8 else (q % 2, f"${8 + q // 4}")
    last = keep // 2 - 1
    lines = [".reg .b32 x, s, u, m, lo, hi;"]
    for row in range(2):
        v = [f"${4 + row * keep // 2 + i}" for i in range(keep // 2)]
        at = row * (last + 1) + quad if keep == 8 else q // 2 % 2 * 4 + row * 2 + quad
        lines += _selectors(bits, at, quad, last)
        if 0 < quad < last:  # of four registers: from the lower and from the upper two, then one of both
            lines += ["shr.b32 u, s, 1;", "lop3.b32 u, u, 0x44444444, 0x32103210, 0xEA;", "and.b32 s, s, 0x77777777;"]
        for p in range(2):
            if p:
                lines.append("shr.b32 s, s, 16;")
            if 0 < quad < last:
                lines += ["shr.b32 u, u, 16;"] if p else []
                lines += [f"prmt.b32 lo, {v[0]}, {v[1]}, s;", f"prmt.b32 hi, {v[2]}, {v[3]}, s;"]
                lines.append("prmt.b32 x, lo, hi, u;")
            else:
                two = v[:2] if quad == 0 else v[-2:]
                lines.append(f"prmt.b32 x, {two[0]}, {two[1]}, s;")
            lines.append(f"shl.b32 m, {bits}, {7 - at};")
            lines.append(f"prmt.b32 m, m, 0, {('0x9988', '0xBBAA')[p]};")  # top bits, repeated
            lines.append(f"and.b32 ${2 * p + row}, x, m;")
    return "{" + " ".join(lines) + "}"


@triton.constexpr_function
def _selectors(bits: str, at: int, quad: int, last: int) -> list[str]:
    """s: byte b is the pair of nibbles by which position b of a quad selects its value's two bytes."""
    lines = [f"shr.b32 x, {bits}, {at};", "and.b32 x, x, 0x01010101;"]
    if 0 < quad < last:
        other = at - 1 if quad == 1 else at + 1  # the quad that is counted before
        lines += [f"shr.b32 u, {bits}, {other};", "and.b32 u, u, 0x01010101;"]
        lines.append(f"mad.lo.u32 u, u, 0x22222222, {'0x10000000' if quad == 1 else '0'};")
        lines.append("prmt.b32 u, u, 0, 0x3333;")
        if quad == 1:
            return [*lines, "mad.lo.u32 s, x, 0x22222200, u;"]
        return [*lines, "mad.hi.u32 s, x, 0x22222222, u;", "xor.b32 s, s, 0xFEFEFEFE;"]
    if quad == 0:
        return [*lines, "mad.lo.u32 s, x, 0x22222200, 0x10101010;"]
    return [*lines, "mul.hi.u32 s, x, 0x22222222;", "xor.b32 s, s, 0x76767676;"]  # what is kept behind each


@triton.jit
def mma16(a, b, acc, H: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """acc + A @ B of product ``H`` of a k-tile."""
    if ASM:
        text: tl.constexpr = mma16_text(H, HALF)
        return tl.inline_asm_elementwise(text, MMA, [a, b, acc], dtype=tl.float32, is_pure=True, pack=4)
    else:
        WARPS: tl.constexpr = acc.shape[0] // 128
        pair = tl.reshape(a, (WARPS * 8, 4, 2, 2))  # row, t, p, h
        weight = tl.permute(tl.join(_number(pair, HALF), _number(pair >> 16, HALF)), (0, 3, 1, 2, 4))
        weight = tl.reshape(weight, (WARPS, 8, 2, 1, 16))
        which = tl.arange(0, 2)[None, None, :, None] == H
        pair = tl.sum(tl.where(which, tl.reshape(b, (WARPS * 8, 4, 2, 2)), 0), 2)
        x = tl.reshape(tl.join(_number(pair, HALF), _number(pair >> 16, HALF)), (WARPS, 1, 1, 8, 16))
        product = tl.reshape(tl.sum(weight * x, 4), (WARPS, 8, 2, 4, 2))
        return acc + tl.reshape(tl.permute(product, (0, 1, 3, 2, 4)), acc.shape)


@triton.jit
def ternary(words, Q: tl.constexpr, HALF: tl.constexpr, ASM: tl.constexpr):
    """Registers a of product ``Q``: -1, 0 or 1."""
    if ASM:
        text: tl.constexpr = ternary_text(Q, HALF)
        return tl.inline_asm_elementwise(text, FROM_4, [words], dtype=tl.int32, is_pure=True, pack=4)
    else:
        r = tl.arange(0, 4)[None, :]
        word, at = _word(words, Q % 8 // 2 + r * 0), 2 * (Q % 2 * 4 + r)
        low, high = ((word >> at) & 3) - 1, ((word >> (at + 16)) & 3) - 1
        return tl.reshape(_bits(low, HALF) | (_bits(high, HALF) << 16), words.shape)


@triton.jit
def levels(words, low, high, low8, high8, Q: tl.constexpr, ASM: tl.constexpr):
    """Registers a of product ``Q``. Bytes of 16 levels: low and high ones of row g, then of row g + 8."""
    if ASM:
        text: tl.constexpr = levels_text(Q)
        return tl.inline_asm_elementwise(
            text, FROM_20, [words, low, high, low8, high8], dtype=tl.int32, is_pure=True, pack=4
        )  # fmt: skip
    else:
        r = tl.arange(0, 4)[None, :]
        word = _word(words, Q % 4 + r * 0)
        made = word * 0
        for v in tl.static_range(2):
            code = (word >> (r % 2 * 16 + r // 2 * 8 + 4 * v)) & 15
            below = tl.where(r % 2 == 0, _word(low, code // 4), _word(low8, code // 4)) >> (code % 4 * 8)
            above = tl.where(r % 2 == 0, _word(high, code // 4), _word(high8, code // 4)) >> (code % 4 * 8)
            made |= ((below & 255) | ((above & 255) << 8)) << (16 * v)
        return tl.reshape(made, words.shape)


@triton.jit
def octets(values, values8, bits, Q: tl.constexpr, KEEP: tl.constexpr, ASM: tl.constexpr):
    """Registers a of product ``Q`` of 4:8 or 8:16. ``values8``: of row g + 8, for 8:16; else ``values`` has both."""
    if ASM:
        text: tl.constexpr = octets_text(Q, KEEP)
        if KEEP == 8:
            return tl.inline_asm_elementwise(
                text, FROM_12, [values, values8, bits], dtype=tl.int32, is_pure=True, pack=4
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(text, FROM_8, [values, bits], dtype=tl.int32, is_pure=True, pack=4)
    else:
        QUADS: tl.constexpr = KEEP // 2
        QUAD: tl.constexpr = Q % QUADS
        r = tl.arange(0, 4)[None, :]
        row = r % 2
        at = row * 4 + QUAD if KEEP == 8 else Q // 2 % 2 * 4 + row * 2 + QUAD
        word = _word(bits, Q // 4 + r * 0)
        made = word * 0
        for v in tl.static_range(2):
            position = r // 2 * 2 + v
            counted = word * 0
            for i in tl.static_range(4):
                before = i < position if QUAD < QUADS // 2 else i > position
                counted += tl.where(before, (word >> (8 * i + at)) & 1, 0)
                if QUAD > 0 and QUAD < QUADS - 1:
                    other = at - 1 if QUAD == 1 else at + 1
                    counted += (word >> (8 * i + other)) & 1
            slot = counted & (KEEP - 1) if QUAD < QUADS // 2 else (KEEP - 1 - counted) & (KEEP - 1)
            if KEEP == 8:
                pair = tl.where(row == 0, _word(values, slot // 2), _word(values8, slot // 2))
            else:
                pair = _word(values, row * 2 + slot // 2)
            kept = ((word >> (8 * position + at)) & 1) != 0
            made |= tl.where(kept, (pair >> (slot % 2 * 16)) & 0xFFFF, 0) << (16 * v)
        return tl.reshape(made, values.shape)
