"""``bitmap``: unstructured weights as one bit a position and the kept values in a row.

  chunk c of row r: columns 128 c .. 128 c + 127, at i = r * chunks + c
    bits[i, 4] int32   bit 8 b + t of word w set where column 128 c + 32 w + 4 t + b is kept
    before[i, 4] u8    values of the chunk before word w
    start[i] int32     first value of the chunk, in units of 8; start[i + 1] ends it
    value[..]          in the order of columns, each chunk padded with zeros to a multiple of 8 (a 16-byte load)

At half density 9.9 bits a position: 8.4 of values, 1 of bits, 0.5 of starts.

Loop ``tile`` (any M): a lane owns a word, so nothing is counted across lanes. Four positions stand in the four bytes
of a shifted word: one multiplication counts what is kept before each, and a dot product of bytes adds one of the four
counts to the rank of the first. The values of a tile go to shared memory as they are stored, one chunk in 128 places,
are read from there by rank, and form a dense tile for the tensor cores. Loading them one by one from global memory
takes as many instructions, but each such load touches some eight cache lines; and a gather along rows becomes shuffles
in Triton (28), which is why the tile is flat. Triton's pipeline would copy the values twice through shared memory (10.0
in all), so the loop carries what the next trip needs in registers instead.

Lane instructions a position on sm_90: 8.4 for M <= 16, 9.1 for tiles of 64 rows. An H200 waits for memory below 9.7 at
half density and 6.6 at three tenths. Of the 8.4, the load, its address and the rank are 3.3, since each position loads
for itself; bits and counts 0.75, packing, masks and "and" of two positions 1.5, staging values 0.8, the tile's way into
the layout of the product and the product 0.5, x and the loop the rest. None of them depends on density, so at less of
it the budget cannot be met; CUDA by hand reaches six in all, by predicated loads without masks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from sparsec.codegen.spec import ACTS, Packed
from sparsec.codegen.triton import LOOPS
from sparsec.codegen.triton.contract import Call, Config
from sparsec.codegen.triton.dot import dot
from sparsec.codegen.triton.epilogue import reduction
from sparsec.codegen.triton.launch import Launch, Loop
from sparsec.codegen.triton.positions import DTYPES, LANE_INSTRUCTIONS, checked, joined, load_x, parted, write_tile
from sparsec.errors import PatternMismatch
from sparsec.formats import Format

WORD = 32
CHUNK = 128  # columns
EXPANDED = "every position of a tile takes 8 to 9, kept or not; half density allows 9.7, less density less"
UNIT = 8  # values


@triton.jit
def fetched(VALUE, start, end, place):
    """[BN, 64] pairs of values of a chunk of each row, from unit ``start`` to ``end``."""
    at = VALUE + (start.to(tl.int64) * 4)[:, None] + place[None, :]
    return tl.load(at, mask=(place // 4)[None, :] < (end - start)[:, None], other=0)


@triton.jit
def summed(bytes, FACTORS: tl.constexpr, base, ASM: tl.constexpr):
    """base plus the four bytes of an int32 times those of ``FACTORS``, in one instruction."""
    if ASM:
        text: tl.constexpr = f"dp4a.u32.u32 $0, $1, {FACTORS}, $2;"
        return tl.inline_asm_elementwise(text, "=r,r,r", [bytes, base], dtype=tl.int32, is_pure=True, pack=1)
    else:
        for j in tl.static_range(4):
            base += ((bytes >> (8 * j)) & 255) * ((FACTORS >> (8 * j)) & 255)
        return base


@triton.jit
def kept_pair(left, right, bits, T: tl.constexpr, H: tl.constexpr, ASM: tl.constexpr):
    """16-bit values of positions 4 T + 2 H and the next in the halves of an int32, zeros where ``bits`` has none."""
    left, right = left.to(tl.int32), right.to(tl.int32)
    if ASM:
        # A permutation repeats the top bit of bytes 2 H and 2 H + 1 of the shifted word: two masks at once.
        text: tl.constexpr = (
            "{.reg .b32 pair, mask; prmt.b32 pair, $1, $2, 0x5410; "
            f"shl.b32 mask, $3, {7 - T}; prmt.b32 mask, mask, 0, {(0x9988, 0xBBAA)[H]}; and.b32 $0, pair, mask;}}"
        )
        return tl.inline_asm_elementwise(text, "=r,r,r,r", [left, right, bits], dtype=tl.int32, is_pure=True, pack=1)
    else:
        left = tl.where((bits >> (16 * H + T)) & 1 != 0, left, 0)
        return (left & 0xFFFF) | (tl.where((bits >> (16 * H + 8 + T)) & 1 != 0, right, 0) << 16)


@triton.jit
def expanded(values, bits, rank, BN: tl.constexpr, ASM: tl.constexpr):
    """A dense tile [BN, 128] int16.

    values: pairs of those kept, [BN, 64]. bits, and the rank of the first position: of each word, [BN * 4].
    """
    ranks = ()
    for t in tl.static_range(8):
        four = (bits >> t) & 0x01010101
        ahead = four * 0x01010100  # byte b: how many of the bytes below it
        ranks = ranks + (rank,)  # type: ignore[assignment]
        for b in tl.static_range(1, 4):
            ranks = ranks + (summed(ahead, 1 << (8 * b), rank, ASM),)  # type: ignore[assignment]
        rank = summed(four, 0x01010101, rank, ASM)
    ranks = tl.reshape(joined(ranks, 32), (BN * 128,))
    values = tl.reshape(tl.join(values.to(tl.int16), (values >> 16).to(tl.int16)), (BN * 128,))
    found = tl.reshape(tl.gather(values, ranks, 0), (BN * 4, 2, 2, 2, 2, 2))
    parts = parted((found,), 32)
    pairs = ()
    for j in tl.static_range(16):
        pair = kept_pair(parts[2 * j], parts[2 * j + 1], bits, j // 2, j % 2, ASM)
        pairs = pairs + (pair.to(tl.int16), (pair >> 16).to(tl.int16))  # type: ignore[assignment]
    return tl.reshape(joined(pairs, 32), (BN, 128))


@triton.jit
def tile(
    X, BITS, BEFORE, START, VALUE, OUT, BIAS, m, n, k, chunks, stride_x, stride_out,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    ACT: tl.constexpr, HAS_BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    block, rows, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, BN * 4)
    word = tl.minimum(block * BN + i // 4, n - 1).to(tl.int64) * chunks * 4 + i % 4
    chunk = tl.minimum(block * BN + tl.arange(0, BN), n - 1).to(tl.int64) * chunks
    place, column = tl.arange(0, 64), tl.arange(0, 128)
    sums = tl.zeros((BN, BM), tl.float32)
    start, end = tl.load(START + chunk + split), tl.load(START + chunk + split + 1)
    values = fetched(VALUE, start, end, place)
    bits, before = tl.load(BITS + word + split * 4), tl.load(BEFORE + word + split * 4)
    following = tl.minimum(split + SPLITS, chunks - 1)
    start, end = tl.load(START + chunk + following), tl.load(START + chunk + following + 1)
    for step in tl.range(split, chunks, SPLITS):
        # What the next trip needs is on its way during this one, and where the values after that lie.
        values_next = fetched(VALUE, start, end, place)
        bits_next, before_next = tl.load(BITS + word + following * 4), tl.load(BEFORE + word + following * 4)
        following = tl.minimum(step + 2 * SPLITS, chunks - 1)
        start, end = tl.load(START + chunk + following), tl.load(START + chunk + following + 1)
        x = load_x(X, step * 128 + column, rows * BM + tl.arange(0, BM), m, k, stride_x, EVEN)
        weight = expanded(values, bits, before.to(tl.int32) + i // 4 * 128, BN, ASM)
        sums = dot(weight.to(X.dtype.element_ty, bitcast=True), x, sums)
        values, bits, before = values_next, bits_next, before_next
    column, row = block * BN + tl.arange(0, BN), rows * BM + tl.arange(0, BM)
    write_tile(sums, OUT, BIAS, column, row, m, n, stride_out, split, SPLITS == 1, ACT, HAS_BIAS)


NATIVE = isinstance(tile, triton.JITFunction)  # the interpreter runs no assembly


class Bitmap:
    kind = "bitmap"
    formats = ("bitmap+bf16", "bitmap+fp16")
    loops = LOOPS["bitmap"]

    def pack(self, weight: torch.Tensor, format: Format, source_key: str) -> Packed:
        if format.values not in ("bf16", "fp16"):
            raise PatternMismatch(format=str(format), detail="tiles on tensor cores hold bf16 or fp16")
        n, k = checked(weight, format.values).shape
        chunks = -(-k // CHUNK)
        padded = torch.nn.functional.pad(weight, (0, chunks * CHUNK - k)).view(n * chunks, CHUNK)
        kept = padded != 0
        counts = kept.view(-1, 4, WORD).sum(2)
        units = -(-counts.sum(1) // UNIT)
        start = torch.cat([units.new_zeros(1), units.cumsum(0)])
        at = start[:-1, None] * UNIT + kept.cumsum(1) - 1
        values = weight.new_zeros(int(start[-1]) * UNIT + UNIT)
        values[at[kept]] = padded[kept]
        before = (counts.cumsum(1) - counts).to(torch.uint8)
        bits = (kept.view(-1, 4, WORD) << _bit(weight.device)).sum(2).to(torch.int32)
        tensors = (bits, before, start.to(torch.int32), values.view(torch.int16))
        return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)

    def unpack(self, packed: Packed) -> torch.Tensor:
        bits, before, start, values = packed.tensors
        n, k = packed.shape
        values = values.view(DTYPES[packed.format.values])
        kept = (bits[:, :, None] >> _bit(bits.device)) & 1
        at = start[:-1, None, None].long() * UNIT + before[:, :, None] + kept.cumsum(2) - kept
        dense = torch.where(kept.bool(), values[torch.where(kept.bool(), at, 0)], 0)
        return dense.view(n, -(-k // CHUNK) * CHUNK)[:, :k].contiguous()

    def configs(self, packed: Packed, loop: str, m: int, capability: int) -> Sequence[Config]:
        """Two words a thread; all rows of x in a tile while they are few; splits so that 1500 warps are in flight."""
        n, k = packed.shape
        rows = 16 if m <= 16 else 32 if m <= 32 else 64
        if rows == 64 and capability >= 120:  # ptxas spills there
            rows = 32
        made = [
            {"bm": rows, "bn": size, "splits": splits, "warps": size // 16}
            for size in (64, 128, 32)
            for splits in (1, 2, 4, 8)
            if splits == 1 or splits * 2 * CHUNK <= k
        ]
        return sorted(made, key=lambda c: abs(-(-n // c["bn"]) * -(-m // rows) * c["splits"] * c["warps"] - 1500))

    def launches(self, packed: Packed, loop: str, call: Call, config: Config) -> list[Launch]:
        bits, before, start, values = packed.tensors
        (n, k), m, splits, bm, bn = packed.shape, call.m, config["splits"], config["bm"], config["bn"]
        out = call.y if splits == 1 else call.x.new_empty((splits, m, n), dtype=torch.float32)
        args = {
            "X": call.x, "BITS": bits, "BEFORE": before, "START": start, "VALUE": values.view(torch.int32), "OUT": out,
            "BIAS": call.y if call.bias is None else call.bias, "m": m, "n": n, "k": k, "chunks": -(-k // CHUNK),
            "stride_x": call.x.stride(0), "stride_out": out.stride(-2),
        }  # fmt: skip
        constants = {
            "BM": bm, "BN": bn, "SPLITS": splits, "EVEN": k % CHUNK == 0,
            "ACT": ACTS.index(call.act), "HAS_BIAS": call.bias is not None, "ASM": NATIVE,
        }  # fmt: skip
        bits_a_position = 8 * packed.bytes / max(n * k, 1)
        counted = Loop("weight", bn * CHUNK, LANE_INSTRUCTIONS * bits_a_position / 8, triton.cdiv(m, bm), EXPANDED)
        grid = (triton.cdiv(n, bn), triton.cdiv(m, bm), splits)
        main = Launch(tile, grid, args, constants, warps=config["warps"], stages=1, loop=counted)
        return [main] if splits == 1 else [main, reduction(out, call.y, call.bias, call.act)]


def _bit(device: torch.device) -> torch.Tensor:
    """The bit of each position of a word."""
    position = torch.arange(WORD, device=device)
    return position % 4 * 8 + position // 4


FAMILY = Bitmap()
