"""2:4 weights against many rows of x: y = act(x @ W.T + bias) on sparse tensor cores, as CUDA C++ text.

Two kernels, told apart by ``Shape.kind``: ``mma`` (mma.sp m16n8k32, sm_80 and all after it) and ``wgmma``
(wgmma.mma_async.sp m64nNk32, sm_90a). Both compute W x^T, because the sparse operand of the hardware is the left one.
N is padded to 128 rows and K to a step when packed; rows of x are predicated. Values are the two kept of each four
columns in order, metadata their places, 4 bits a group (first | second << 2).

  metadata, 16 bits   word[K/64][N/16][lane = 4 g + t]: columns 16 t .. of row g (low half) and row g + 8 (high half);
                      lanes t = 0, 1 serve the first product of a step, t = 2, 3 the second (PTX ISA, sparse mma, .bf16)
  metadata, 8 bits    word[K/64][N/16][lane = 4 g + 2 c + h]: columns 32 c .. of row g + 8 h, all lanes for one product
                      (PTX ISA, sparse mma.m16n8k64; ``ELayout`` of CUTLASS's SM120_SPARSE_16x8x64 and GMMA 64x64)
  mma                 words of a step beside each other: [step][N/16][words of a step][lane]
  wgmma               the same words as [step][N/64][words of a step][warp][lane]
  values, mma         [K/64][N/16][2][lane = 4 g + t][register][2]: as lanes hold them. Register r: row g + 8 (r % 2),
                      kept columns 2 t, 2 t + 1 of the first (r < 2) or second eight
  values, wgmma       [K/128][N/64][row][8 chunks of 8]: chunk c of row r at c ^ (r % 8), the 128-byte swizzle

e4m3 (``Shape.values`` fp8): products cover 64 columns (m16n8k64 on sm_89 and sm_120, m64nNk64 on sm_90a), which are as
many bytes as 32 of 16 bits, in the same places. So two values count as one of 16 bits, a step has twice the columns,
and the maps of values above hold with K/2 for K. Scales, fp32: one a weight row, one a row of x (``quantize.py``).

9 bits a weight, 5 in fp8. Text: constants, the instructions (``device.cuh``), ``prefill24_common.cuh``, the kernel's
own file.

Shared memory feeds a block of 128 x 128 (mma, warps of 64 x 64) for 48 clocks of each 64 that its products take on an
A100. wgmma reads all of x for each 64 weight rows: 128 bytes a clock at the full rate, so values beside it cost a share
that falls with block_m (a fifth at 128, a tenth at 256). All shapes compile without spills (registers: mma 244 on
sm_80, wgmma 128 at block_m 128 and 212 at 256; of e4m3 244 on sm_89, 128 and 214). Neither has run on a GPU.

Hopper's tensor cores add products of e4m3 with about 14 bits, not 24 (DeepSeek-V3, 2024, section 3.3.2). That is below
what rounding x to four bits costs, and the sums are left as they come.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsec.codegen.cuda import driver, nvrtc
from sparsec.codegen.cuda.gmma import instructions
from sparsec.codegen.spec import ACTS, Packed
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, Pattern
from sparsec.grid import OnFp8, on_fp8_grid

HERE = Path(__file__).parent
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
STEP = {"mma": 64, "wgmma": 128}  # columns of K, in units of two bytes, that one stage of shared memory holds
FP8 = (89, 90, 120)  # elsewhere there is no such product, or ptxas puts one together from those of fp16
ROWS = 128  # N is padded to


@dataclass(frozen=True)
class Shape:
    """Everything that shapes a kernel's text. ``tiles_n``, ``tiles_m``: 16-row and 8-row tiles of a warp (mma).

    ``block_m``: rows of x of a block. ``warps``: for mma, along weight rows and along rows of x. ``ahead``: stages that
    wgmma loads ahead of its products; the others wait for them. ``values``: ``fp8`` where weight and x are e4m3;
    ``dtype`` is of y and the bias then.
    """

    kind: str
    dtype: str
    act: str = ""
    block_m: int = 128
    stages: int = 3
    warps: tuple[int, int] = (2, 2)
    ahead: int = 2
    values: str = ""

    @property
    def selectors(self) -> int:
        """Products that share a word of metadata a lane."""
        return 1 if self.values else 2

    @property
    def threads(self) -> int:
        return 256 if self.kind == "wgmma" else 32 * self.warps[0] * self.warps[1]

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory; the first kilobyte is for alignment."""
        stage = ROWS * (64 + 16 // self.selectors) + self.block_m * 128
        if self.kind == "wgmma":
            stage *= 2
        scales = 4 * (ROWS + self.block_m) if self.values else 0
        return 1024 + max(self.stages * stage, self.block_m * (ROWS + 8) * 2 + scales)

    @property
    def name(self) -> str:
        values = f"{self.values}_" if self.values else ""
        return f"prefill24_{self.kind}_{values}{self.dtype}_{self.act or 'plain'}_m{self.block_m}_s{self.stages}"

    def grid(self, m: int, n: int) -> int:
        """Blocks for a product with M rows of x and N weight rows."""
        return -(-n // ROWS) * -(-m // self.block_m)


def shapes(dtype: str, act: str, m: int, capability: int, values: str = "") -> list[Shape]:
    """The space that tuning may search, the best guess first: few rows of x take smaller tiles.

    ``values``: ``fp8``, for which there is nothing on GPUs without such products.
    """
    mma = [Shape("mma", dtype, act, rows, stages, values=values) for rows in (128, 64, 32) for stages in (3, 4)]
    if capability in (86, 89, 120):  # 99 KB of shared memory for a block
        mma = [shape for shape in mma if shape.shared <= 99 * 1024]
    wide = [Shape("wgmma", dtype, act, *sizes) for sizes in ((128, 4), (192, 3), (256, 2), (64, 4))]
    wide = [replace(s, ahead=min(2, s.stages - 1), values=values) for s in wide]
    made = wide + mma if capability == 90 else mma
    if values:  # on sm_90 only wgmma takes e4m3; on sm_120 the smallest tile spills a register with four stages
        made = [s for s in made if capability in FP8 and (s.kind == "wgmma") == (capability == 90)]
        made = [s for s in made if (s.block_m, s.stages) != (32, 4)]
    return sorted(made, key=lambda s: -(-m // s.block_m) * s.block_m)


def text(shape: Shape, device: str | None = None) -> str:
    """The CUDA C++ translation unit. ``device`` replaces the text of the instructions."""
    float16 = "bf16" if shape.dtype == "bf16" else "f16"
    values, columns = ("e4m3", 64) if shape.values else (float16, 32)
    constants = {
        "kBlockN": ROWS, "kBlockM": shape.block_m, "kThreads": shape.threads, "kStages": shape.stages,
        "kAct": ACTS.index(shape.act), "kSelectors": shape.selectors, "kScaled": int(bool(shape.values)),
    }  # fmt: skip
    if shape.kind == "mma":
        along, across = shape.warps
        constants |= {"kWarpsN": along, "kTilesN": ROWS // 16 // along, "kTilesM": shape.block_m // 8 // across}
    else:
        constants |= {"kAhead": shape.ahead}
    head = [
        f'#define FLOAT16 "{float16}"',
        f'#define MMA_SPARSE "m16n8k{columns}.row.col.f32.{values}.{values}.f32"',
        *(f"constexpr int {name} = {value};" for name, value in constants.items()),
    ]
    if device is None:
        device = source("device.cuh") + (instructions(shape.block_m, values) if shape.kind == "wgmma" else "")
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
    value, place = _compressed(_padded(weight, STEP[kind]), format)
    return Packed(
        format, 1, _ordered(value, place, kind, ""), _nothing(), (weight.shape[0], weight.shape[1]), source_key
    )


def pack_fp8(weight: torch.Tensor, kind: str, source_key: str = "", scale: torch.Tensor | None = None) -> Packed:
    """Pack a 2:4 weight [N, K] that lies on a grid of e4m3 values with one scale a row, which is found or given.

    weight: any float dtype, on its own device; scale: [N], finite and positive. tensors: as of ``pack``, the scales
    fp32 [N], and an empty one of the weight's dtype. Raises PatternMismatch for what is not 2:4, a weight that
    e4m3 values times the scales do not give back bit by bit, and scales that are no numbers to divide by.
    """
    format = Format(Pattern("nm", (2, 4)), "fp8")
    found = fp8_of(weight, format, scale)
    value, place = _compressed(_padded(found.q.view(torch.uint8), 2 * STEP[kind]), format)
    pairs = value.view(torch.int16).view(len(value), -1, 2)  # two of 8 bits where one of 16 would be
    tensors = (*_ordered(pairs, place, kind, "fp8"), found.scale, weight.new_empty(0))
    return Packed(format, 1, tensors, _nothing(), (weight.shape[0], weight.shape[1]), source_key)


def fp8_of(weight: torch.Tensor, format: Format, scale: torch.Tensor | None = None) -> OnFp8:
    """A weight [N, K] as e4m3 values and scales [N], found where they are not given. Raises PatternMismatch."""
    if scale is not None:
        if scale.shape != weight.shape[:1]:
            detail = f"{len(weight)} rows have scales of shape {tuple(scale.shape)}"
            raise PatternMismatch(format=str(format), detail=detail)
        bad = ~(scale.isfinite() & (scale > 0))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            detail = f"the scale of row {row} is {float(scale[row])}, and scales are finite and positive"
            raise PatternMismatch(format=str(format), detail=detail)
    found = on_fp8_grid(weight, scale)
    if found is None:
        low, high = 0, len(weight)  # of the first ``high`` rows one cannot be had, of the first ``low`` none
        while high - low > 1:
            middle = (low + high) // 2
            part = on_fp8_grid(weight[low:middle], None if scale is None else scale[low:middle])
            low, high = (low, middle) if part is None else (middle, high)
        times = "a scale" if scale is None else f"its scale {float(scale[low])}"
        raise PatternMismatch(format=str(format), detail=f"row {low} is not e4m3 values times {times}, exactly")
    return found


def _padded(weight: torch.Tensor, step: int) -> torch.Tensor:
    n, k = weight.shape
    return torch.nn.functional.pad(weight, (0, -k % step if k else step, 0, -n % ROWS if n else ROWS))


def _ordered(value: torch.Tensor, place: torch.Tensor, kind: str, values: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and metadata as the kernel reads them. value: 16 bits, [N, units of two bytes of K / 4, 2]."""
    words = _words8(place) if values else _words(place)
    steps = len(value[0]) * 4 // STEP[kind]
    words = words.view(steps, len(words) // steps, -1, 32)  # step, word, tile, lane
    if kind == "mma":
        return _fragments(value), words.transpose(1, 2).flatten(2).contiguous()
    return _swizzled(value), words.view(*words.shape[:2], -1, 4, 32).transpose(1, 2).contiguous()


def _nothing() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64)


def linear(
    packed: Packed,
    shape: Shape,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    capability: int,
    x_scale: torch.Tensor | None = None,
) -> None:
    """act(x @ W.T + bias) -> y on their GPU. x: [M, K], y: [M, N] of unit inner stride, bias: [N] or None.

    fp8: x is float8_e4m3fn, its columns filled up with zeros to a multiple of 16, and x_scale fp32 [M].
    Raises NoNvrtc, KernelCompileFailed and NoDriver.
    """
    args = arguments(packed, shape, x, y, bias, x_scale)
    grid = (shape.grid(len(x), packed.shape[0]),)
    driver.launch(cubin(shape, capability), "prefill24", grid, shape.threads, shape.shared, args, x.device)


def arguments(
    packed: Packed,
    shape: Shape,
    x: torch.Tensor,
    y: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor | None = None,
) -> list[driver.Argument]:
    """Of the kernel. Rows of x have to start on 16 bytes; where they do not, x is copied."""
    values, words = packed.tensors[:2]
    scale = packed.tensors[2] if shape.values else None
    if (shape.values or x_scale is not None) and (x.dtype != torch.float8_e4m3fn or x_scale is None or scale is None):
        raise ValueError(f"x of {x.dtype} {'with' if x_scale is not None else 'without'} scales for {shape.name}")
    if shape.values:
        x = x.view(torch.int16)  # the kernel counts in two bytes
    (m, k), n = x.shape, packed.shape[0]
    if k % 8 or x.stride(0) % 8 or x.stride(1) != 1 or x.data_ptr() % 16:
        x = torch.nn.functional.pad(x, (0, -k % 8)).clone(memory_format=torch.contiguous_format)
    wide = n % 8 == 0 and y.stride(0) % 8 == 0 and y.data_ptr() % 16 == 0
    sizes = (m, n, x.shape[1], -(-n // ROWS) * ROWS, int(wide))
    return [x, values, words, bias, scale, x_scale, y, x.stride(0), y.stride(0), *map(driver.Int32, sizes)]


def unpack(packed: Packed, kind: str) -> torch.Tensor:
    """The [N, K] weight back, bit by bit but for the sign of zeros."""
    value, words = packed.tensors[:2]
    n, k = packed.shape
    fp8 = packed.format.values == "fp8"
    if kind == "mma":
        steps, tiles = value.shape[:2]
        value = value.view(steps, tiles, 2, 8, 4, 2, 2, 2).permute(1, 6, 3, 0, 2, 5, 4, 7)
    else:
        steps, tiles = value.shape[:2]
        value = value.gather(3, _order(value.device)[None, None, :, :, None].expand_as(value)).permute(1, 2, 0, 3, 4)
        words, tiles = words.transpose(1, 2), tiles * 4
    if kind == "mma":
        words = words.view(steps, tiles, -1, 32).transpose(1, 2)
    words = words.reshape(-1, tiles, 32)
    padded = tiles * 16
    value = value.reshape(padded, -1, 2)
    if fp8:
        value = value.contiguous().view(torch.uint8).view(padded, -1, 2)
    place = _places8(words) if fp8 else _places(words)
    dense = value.new_zeros(padded, place.shape[1], 4).scatter_(2, place, value)
    dense = dense.view(padded, -1)[:n, :k].contiguous()
    if not fp8:
        return dense
    scale, like = packed.tensors[2:]
    return OnFp8(dense.view(torch.float8_e4m3fn), scale).weight(like.dtype)


def _places(words: torch.Tensor) -> torch.Tensor:
    """The places [N, K/4, 2] of ``_words``."""
    padded = words.shape[1] * 16
    halves = torch.stack([words & 0xFFFF, words >> 16 & 0xFFFF])  # [2, K/64, N/16, 32]
    halves = halves.view(2, *words.shape[:2], 8, 4).permute(2, 0, 3, 1, 4).reshape(padded, -1, 1)
    nibble = halves >> torch.arange(0, 16, 4, device=words.device) & 15
    return torch.stack([nibble & 3, nibble >> 2], -1).view(padded, -1, 2).long()


def _places8(words: torch.Tensor) -> torch.Tensor:
    """The places [N, K/4, 2] of ``_words8``."""
    padded = words.shape[1] * 16
    rows = words.view(*words.shape[:2], 8, 2, 2).permute(1, 4, 2, 0, 3).reshape(padded, -1, 1)
    nibble = rows >> torch.arange(0, 32, 4, device=words.device) & 15
    return torch.stack([nibble & 3, nibble >> 2], -1).view(padded, -1, 2).long()


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


def _words8(place: torch.Tensor) -> torch.Tensor:
    """Metadata of 8-bit products as int32 [K/64, N/16, 32] of places [N, K/4, 2]."""
    n = len(place)
    nibble = place[..., 0].long() | place[..., 1].long() << 2
    word = (nibble.view(n, -1, 8) << torch.arange(0, 32, 4, device=place.device)).sum(2)
    word = torch.where(word < 2**31, word, word - 2**32).int().view(n // 16, 2, 8, -1, 2)  # tile, h, g, K/64, c
    return word.permute(3, 0, 2, 4, 1).reshape(-1, n // 16, 32).contiguous()


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
