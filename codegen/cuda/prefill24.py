"""2:4 weights against many rows of x: y = act(x @ W.T + bias) on sparse tensor cores, as CUDA C++ text.

Two kernels, told apart by ``Shape.kind``: ``mma`` (mma.sp m16n8k32, sm_80 and all after it) and ``wgmma``
(wgmma.mma_async.sp m64nNk32, sm_90a). Both compute W x^T, because the sparse operand of the hardware is the left one.
N is padded to 128 rows and K to a step when packed; rows of x are predicated. Values are the two kept of each four
columns in order, metadata their places, 4 bits a group (first | second << 2), 16 columns a half-word.

  metadata, both      word[K/64][N/16][lane = 4 g + t]: columns 16 t .. of row g (low half) and row g + 8 (high half);
                      lanes t = 0, 1 serve the first product of a step, t = 2, 3 the second (PTX ISA, sparse mma, .bf16)
  wgmma               the same words as [K/128][N/64][2 halves of K][warp][lane]
  values, mma         [K/64][N/16][2][lane = 4 g + t][register][2]: as lanes hold them. Register r: row g + 8 (r % 2),
                      kept columns 2 t, 2 t + 1 of the first (r < 2) or second eight
  values, wgmma       [K/128][N/64][row][8 chunks of 8]: chunk c of row r at c ^ (r % 8), the 128-byte swizzle

9 bits a weight. Text: constants, the instructions (``device.cuh``), ``prefill24_common.cuh``, the kernel's own file.

Shared memory feeds a block of 128 x 128 (mma, warps of 64 x 64) for 48 clocks of each 64 that its products take on an
A100. wgmma reads all of x for each 64 weight rows: 128 bytes a clock at the full rate, so values beside it cost a share
that falls with block_m (a fifth at 128, a tenth at 256). All shapes compile without spills (registers on sm_90: mma
244, wgmma 128 at block_m 128 and 212 at 256). Neither has run on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch

from sparsec.codegen.cuda import driver, nvrtc
from sparsec.codegen.cuda.gmma import instructions
from sparsec.codegen.spec import ACTS, Packed
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, Pattern

HERE = Path(__file__).parent
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
STEP = {"mma": 64, "wgmma": 128}  # columns of K that one stage of shared memory holds
ROWS = 128  # N is padded to


@dataclass(frozen=True)
class Shape:
    """Everything that shapes a kernel's text. ``tiles_n``, ``tiles_m``: 16-row and 8-row tiles of a warp (mma).

    ``block_m``: rows of x of a block. ``warps``: for mma, along weight rows and along rows of x. ``ahead``: stages that
    wgmma loads ahead of its products; the others wait for them.
    """

    kind: str
    dtype: str
    act: str = ""
    block_m: int = 128
    stages: int = 3
    warps: tuple[int, int] = (2, 2)
    ahead: int = 2

    @property
    def threads(self) -> int:
        return 256 if self.kind == "wgmma" else 32 * self.warps[0] * self.warps[1]

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory; the first kilobyte is for alignment."""
        stage = ROWS * 128 + self.block_m * 256 + ROWS * 16 if self.kind == "wgmma" else ROWS * 72 + self.block_m * 128
        return 1024 + max(self.stages * stage, self.block_m * (ROWS + 8) * 2)

    @property
    def name(self) -> str:
        return f"prefill24_{self.kind}_{self.dtype}_{self.act or 'plain'}_m{self.block_m}_s{self.stages}"

    def grid(self, m: int, n: int) -> int:
        """Blocks for a product with M rows of x and N weight rows."""
        return -(-n // ROWS) * -(-m // self.block_m)


def shapes(dtype: str, act: str, m: int, capability: int) -> list[Shape]:
    """The space that tuning may search, the best guess first: few rows of x take smaller tiles."""
    mma = [Shape("mma", dtype, act, rows, stages) for rows in (128, 64, 32) for stages in (3, 4)]
    if capability in (86, 89, 120):  # 99 KB of shared memory for a block
        mma = [shape for shape in mma if shape.shared <= 99 * 1024]
    wide = [Shape("wgmma", dtype, act, *sizes) for sizes in ((128, 4), (192, 3), (256, 2), (64, 4))]
    wide = [Shape(s.kind, s.dtype, act, s.block_m, s.stages, ahead=min(2, s.stages - 1)) for s in wide]
    made = wide + mma if capability == 90 else mma
    return sorted(made, key=lambda s: -(-m // s.block_m) * s.block_m)


def text(shape: Shape, device: str | None = None) -> str:
    """The CUDA C++ translation unit. ``device`` replaces the text of the instructions."""
    float16 = "bf16" if shape.dtype == "bf16" else "f16"
    constants = {
        "kBlockN": ROWS, "kBlockM": shape.block_m, "kThreads": shape.threads, "kStages": shape.stages,
        "kAct": ACTS.index(shape.act),
    }  # fmt: skip
    if shape.kind == "mma":
        along, across = shape.warps
        constants |= {"kWarpsN": along, "kTilesN": ROWS // 16 // along, "kTilesM": shape.block_m // 8 // across}
    else:
        constants |= {"kAhead": shape.ahead}
    head = [f'#define FLOAT16 "{float16}"', *(f"constexpr int {name} = {value};" for name, value in constants.items())]
    if device is None:
        device = source("device.cuh") + (instructions(shape.block_m) if shape.kind == "wgmma" else "")
    return "\n".join([*head, device, source("prefill24_common.cuh"), source(f"prefill24_{shape.kind}.cuh")])


@functools.cache
def source(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@functools.cache
def cubin(shape: Shape, capability: int) -> bytes:
    """Machine code for sm_``capability``; wgmma takes sm_90a. Raises NoNvrtc, KernelCompileFailed."""
    arch = "sm_90a" if shape.kind == "wgmma" else f"sm_{capability}"
    return nvrtc.compile(text(shape), arch, shape.name)


def pack(weight: torch.Tensor, kind: str, source_key: str = "") -> Packed:
    """Pack a 2:4 weight [N, K], bf16 or fp16, for kernel ``kind``, on its own device.

    Raises PatternMismatch, naming the first group of four with more than two values.
    """
    format = Format(Pattern("nm", (2, 4)), DTYPES.get(weight.dtype, str(weight.dtype)))
    if weight.dtype not in DTYPES:
        raise PatternMismatch(format="nm:2:4 on tensor cores", detail=f"its values are {weight.dtype}")
    n, k = weight.shape
    value, place = _compressed(
        torch.nn.functional.pad(weight, (0, -k % STEP[kind] if k else STEP[kind], 0, -n % ROWS if n else ROWS)), format
    )
    words = _words(place)
    tensors = (_fragments(value), words) if kind == "mma" else (_swizzled(value), _by_warpgroup(words))
    return Packed(format, 1, tensors, torch.zeros(0, dtype=torch.int64), (n, k), source_key)


def linear(
    packed: Packed, shape: Shape, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None, capability: int
) -> None:
    """act(x @ W.T + bias) -> y on their GPU. x: [M, K], y: [M, N] of unit inner stride, bias: [N] or None.

    Raises NoNvrtc, KernelCompileFailed and NoDriver.
    """
    args = arguments(packed, shape, x, y, bias)
    grid = (shape.grid(len(x), packed.shape[0]),)
    driver.launch(cubin(shape, capability), "prefill24", grid, shape.threads, shape.shared, args, x.device)


def arguments(
    packed: Packed, shape: Shape, x: torch.Tensor, y: torch.Tensor, bias: torch.Tensor | None
) -> list[driver.Argument]:
    """Of the kernel. Rows of x have to start on 16 bytes; where they do not, x is copied."""
    values, words = packed.tensors
    (m, k), n = x.shape, packed.shape[0]
    if k % 8 or x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -k % 8)).clone(memory_format=torch.contiguous_format)
    wide = n % 8 == 0 and y.stride(0) % 8 == 0 and y.data_ptr() % 16 == 0
    sizes = (m, n, x.shape[1], -(-n // ROWS) * ROWS, int(wide))
    return [x, values, words, bias, y, x.stride(0), y.stride(0), *map(driver.Int32, sizes)]


def unpack(packed: Packed, kind: str) -> torch.Tensor:
    """The [N, K] weight back, bit by bit but for the sign of zeros."""
    value, words = packed.tensors
    n, k = packed.shape
    if kind == "mma":
        steps, tiles = value.shape[:2]
        value = value.view(steps, tiles, 2, 8, 4, 2, 2, 2).permute(1, 6, 3, 0, 2, 5, 4, 7)
    else:
        steps, tiles = value.shape[:2]
        value = value.gather(3, _order(value.device)[None, None, :, :, None].expand_as(value)).permute(1, 2, 0, 3, 4)
        words = words.permute(0, 2, 1, 3, 4).reshape(2 * steps, tiles * 4, 32)
    padded = words.shape[1] * 16
    value = value.reshape(padded, -1, 2)
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF])  # [2, K/64, N/16, 32]
    halves = halves.view(2, *words.shape[:2], 8, 4).permute(2, 0, 3, 1, 4).reshape(padded, -1, 1)
    nibble = halves >> torch.arange(0, 16, 4, device=words.device) & 15
    place = torch.stack([nibble & 3, nibble >> 2], -1).view(padded, -1, 2).long()
    dense = value.new_zeros(padded, place.shape[1], 4).scatter_(2, place, value)
    return dense.view(padded, -1)[:n, :k].contiguous()


def _compressed(weight: torch.Tensor, format: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The kept two of each four: values [N, K/4, 2] and their places 0 .. 3, ascending, uint8 alike."""
    groups = weight.detach().view(len(weight), -1, 4)
    kept = groups != 0
    if bool((kept.sum(2) > 2).any()):
        row, group = (int(i) for i in (kept.sum(2) > 2).nonzero()[0])
        raise PatternMismatch(format=str(format), detail=f"row {row} keeps more than two of columns {4 * group} to "
                              f"{4 * group + 3}")  # fmt: skip
    bits = torch.tensor([1, 2, 4, 8], dtype=torch.uint8, device=weight.device)
    table = torch.zeros(16, 2, dtype=torch.uint8)
    for code in range(16):
        places = [i for i in range(4) if code >> i & 1][:2]
        places += [i for i in range(4) if i not in places][: 2 - len(places)]
        table[code] = torch.tensor(sorted(places), dtype=torch.uint8)
    place = table.to(weight.device)[(kept * bits).sum(2)]
    value = groups.gather(2, place.long())
    return torch.where(value != 0, value, 0), place  # no -0.0: unpacking need not give the sign of a zero back


def _words(place: torch.Tensor) -> torch.Tensor:
    """Metadata as int32 [K/64, N/16, 32] of places [N, K/4, 2]."""
    n = len(place)
    nibble = place[..., 0].int() | place[..., 1].int() << 2
    half = (nibble.view(n, -1, 4) << torch.arange(0, 16, 4, device=place.device, dtype=torch.int32)).sum(2).int()
    half = half.view(n // 16, 2, 8, -1, 4)  # tile, row / 8, g, K/64, t
    return (half[:, 0] | half[:, 1] << 16).permute(2, 0, 1, 3).reshape(-1, n // 16, 32).contiguous()


def _by_warpgroup(words: torch.Tensor) -> torch.Tensor:
    steps, tiles, _ = words.shape
    return words.view(steps // 2, 2, tiles // 4, 4, 32).permute(0, 2, 1, 3, 4).contiguous()


def _fragments(value: torch.Tensor) -> torch.Tensor:
    """[K/64, N/16, 2, 32, 4, 2] of kept values [N, K/4, 2]."""
    n = len(value)
    parts = value.reshape(n // 16, 2, 8, -1, 2, 2, 4, 2)  # tile, row / 8, g, K/64, product, eight, t, pair
    return parts.permute(3, 0, 4, 2, 6, 5, 1, 7).reshape(-1, n // 16, 2, 32, 4, 2).contiguous()


def _swizzled(value: torch.Tensor) -> torch.Tensor:
    """[K/128, N/64, 64, 8, 8] of kept values [N, K/4, 2]."""
    parts = value.reshape(len(value) // 64, 64, -1, 8, 8).permute(2, 0, 1, 3, 4)
    return parts.gather(3, _order(value.device)[None, None, :, :, None].expand_as(parts)).contiguous()


def _order(device: torch.device) -> torch.Tensor:
    """Which chunk lies where in each of 64 rows, [64, 8]; its own inverse."""
    return torch.arange(8, device=device)[None, :] ^ (torch.arange(64, device=device)[:, None] & 7)
