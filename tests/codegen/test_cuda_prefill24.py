"""2:4 prefill kernels as CUDA C++: their packs, their tiling run on a CPU, and their machine code for GPUs."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsec.codegen import reference
from sparsec.codegen.cuda import driver, nvrtc, prefill24
from sparsec.codegen.cuda.prefill24 import Shape, pack, shapes, unpack
from sparsec.errors import KernelCompileFailed, NoNvrtc, PatternMismatch

EMULATION = Path(__file__).parent / "emulated_device.h"
# Runs a grid of blocks: x, values, metadata are the memory that may be read, with their sizes in bytes.
TAIL = """
extern "C" void emulate(const u16 *x, i64 x_bytes, const char *values, i64 value_bytes, const char *meta,
                        i64 meta_bytes, const u16 *bias, u16 *y, i64 x_stride, i64 y_stride, int m, int n, int k,
                        int rows, int wide, int blocks, int shared, int is_late, int backward) {
  readable = {{(const char *)x, (const char *)x + x_bytes}, {values, values + value_bytes}, {meta, meta + meta_bytes}};
  late = is_late;
  body = [=] { prefill24(x, values, meta, bias, y, x_stride, y_stride, m, n, k, rows, wide); };
  for (block_now = 0; block_now < blocks; ++block_now) run_block(kThreads, shared, backward);
}
"""


def weight24(n: int, k: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Random 2:4, with groups of fewer than two values, of none, and a last group that is narrower."""
    generator = torch.Generator().manual_seed(seed)
    score = torch.nn.functional.pad(torch.rand(n, k, generator=generator), (0, -k % 4), value=-1.0).view(n, -1, 4)
    kept = torch.zeros_like(score).scatter_(2, score.topk(2, dim=2).indices, 1.0).view(n, -1)[:, :k]
    kept *= torch.rand(n, k, generator=generator) < 0.8
    return (torch.randn(n, k, generator=generator) * kept).to(dtype)


@functools.cache
def emulated(shape: Shape) -> ctypes.CDLL:
    """The kernel's text with emulated instructions, compiled for this machine."""
    device = EMULATION.read_text(encoding="utf-8")
    command = ["g++", "-std=c++17", "-O1", "-w", "-shared", "-fPIC", "kernel.cpp", "-o", "kernel.so"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.cpp").write_text(prefill24.text(shape, device) + TAIL, encoding="utf-8")
        subprocess.run(command, cwd=folder, check=True)
        return ctypes.CDLL(str(Path(folder, "kernel.so")))


def product(shape: Shape, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, late: int, backward: int,
            pitch: int = 0) -> torch.Tensor:  # fmt: skip
    """y by the emulated kernel. Memory around y must stay as it was."""
    m, n = len(x), len(weight)
    packed = pack(weight, shape.kind)
    values, words = packed.tensors
    y = torch.full((m + 1, pitch or n), 7.0, dtype=x.dtype)
    args = prefill24.arguments(packed, shape, x, y, bias)
    x_used, *others = args
    assert isinstance(x_used, torch.Tensor)
    held = [(len(x_used) - 1) * x_used.stride(0) * 2 + x_used.shape[1] * 2, values.numel() * 2, words.numel() * 4]
    ranges = [part for of, size in zip(args[:3], held, strict=True) for part in driver.arguments([of, size])]
    blocks = [ctypes.c_int(number) for number in (shape.grid(m, n), shape.shared - 1024, late, backward)]
    emulated(shape).emulate(*ranges, *driver.arguments(others[2:]), *blocks)
    assert bool((y[m] == 7).all())
    assert bool((y[:m, n:] == 7).all())
    return y[:m, :n]


SHAPES = [
    Shape("mma", "bf16", "", 128, 3),
    Shape("mma", "bf16", "silu", 32, 4),
    Shape("mma", "fp16", "relu", 64, 3, (4, 1)),
    Shape("wgmma", "bf16", "gelu", 64, 4),
    Shape("wgmma", "fp16", "gelu_tanh", 128, 3, ahead=1),
    Shape("wgmma", "bf16", "", 192, 3, ahead=2),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is missing")
@pytest.mark.parametrize(
    ("shape", "late", "backward"),
    [(s, late, way) for s in SHAPES for late in range(4 if s.kind == "wgmma" else 2) for way in (0, 1)],
    ids=lambda of: of.name if isinstance(of, Shape) else str(of),
)
def test_tiles_pipelines_and_edges_are_right(shape: Shape, late: int, backward: int) -> None:
    dtype = torch.bfloat16 if shape.dtype == "bf16" else torch.float16
    sizes = [(37, 128, 1000), (1, 8, 8), (70, 130, 75), (200, 256, 328)]
    for m, n, k in sizes if late == backward == 0 else sizes[:1]:
        torch.manual_seed(m)
        x = torch.randn(m, k + 8, dtype=dtype)[:, :k]  # rows of 16 bytes where k is a multiple of 8
        weight = weight24(n, k, dtype, m)
        bias = torch.randn(n, dtype=dtype) if m != 70 else None
        y = product(shape, x, weight, bias, late, backward, -(-n // 8) * 8 + 8 * (m % 2))
        expected = reference.linear(x, weight, bias, shape.act).float()
        scale = x.float().abs() @ weight.float().abs().T + (0 if bias is None else bias.float().abs())
        off = (y.float() - expected).abs() - (2.0**-8 if dtype == torch.bfloat16 else 2.0**-11) * scale.clamp(min=1e-2)
        assert bool((off <= 0).all()), (m, n, k, float(off.max()))


def numpy_weight(kind: str, values: np.ndarray, words: np.ndarray, n: int, k: int) -> np.ndarray:
    """A pack read as the hardware reads it, one value after the other: PTX ISA, fragments of sparse mma and wgmma."""
    out = np.zeros((-(-n // 128) * 128, -(-k // 128) * 128), np.float32)
    raw, codes = values.reshape(-1), words.reshape(-1)
    tiles, wide = len(out) // 16, len(out) // 64
    for row in range(n):
        for kept in range(-(-k // 4) * 2):  # two of each four columns
            step, inside = kept // 32, kept % 32
            product, place = inside // 16, inside % 16
            g, high, t = row % 8, row % 16 // 8, place % 8 // 2
            if kind == "mma":
                lane, register = 4 * g + t, place // 8 * 2 + high
                at = (((step * tiles + row // 16) * 2 + product) * 32 + lane) * 8 + register * 2 + place % 2
                word = (step * tiles + row // 16) * 32 + 4 * g + 2 * product + place // 8
            else:
                byte = (kept % 64 * 2) ^ ((row % 8) << 4)
                at = ((kept // 64 * wide + row // 64) * 64 + row % 64) * 64 + byte // 2
                word = ((kept // 64 * wide + row // 64) * 2 + kept % 64 // 32) * 128 + row % 64 // 16 * 32
                word += 4 * g + 2 * product + place // 8
            half = int(codes[word]) >> (16 * high) & 0xFFFF
            column = kept // 2 * 4 + (half >> (place % 8 // 2 * 4 + place % 2 * 2) & 3)
            if raw[at]:
                out[row, column] = raw[at]
    return out[:n, :k]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_packs_hold_the_weight_where_the_hardware_looks(kind: str, dtype: torch.dtype) -> None:
    for n, k in [(1, 4), (70, 300), (130, 66)]:
        weight = weight24(n, k, dtype, n)
        packed = pack(weight, kind)
        assert torch.equal(unpack(packed, kind), weight)
        values, words = packed.tensors
        read = numpy_weight(kind, values.float().numpy(), words.numpy(), n, k)
        assert np.array_equal(read, weight.float().numpy())


@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_weights_without_rows_or_columns_are_packed(kind: str) -> None:
    for shape in [(0, 8), (3, 0)]:
        weight = torch.zeros(shape, dtype=torch.bfloat16)
        assert torch.equal(unpack(pack(weight, kind), kind), weight)


@pytest.mark.parametrize("kind", ["mma", "wgmma"])
def test_packs_take_nine_bits_a_weight(kind: str) -> None:
    assert pack(weight24(256, 1024, torch.bfloat16), kind).bytes * 8 == 9 * 256 * 1024


def test_negative_zeros_nan_and_infinities_are_packed() -> None:
    weight = torch.zeros(2, 8, dtype=torch.bfloat16)
    weight[0, :4] = torch.tensor([-0.0, float("nan"), float("inf"), -0.0])
    back = unpack(pack(weight, "mma"), "mma")
    assert torch.equal(back.nan_to_num(1, 2), weight.nan_to_num(1, 2))


def test_what_is_not_2_of_4_or_not_16_bits_is_refused() -> None:
    weight = torch.zeros(4, 16, dtype=torch.bfloat16)
    weight[2, 9:12] = 1
    with pytest.raises(PatternMismatch, match="row 2 keeps more than two of columns 8 to 11"):
        pack(weight, "mma")
    with pytest.raises(PatternMismatch, match="float32"):
        pack(torch.zeros(4, 16), "mma")


@pytest.fixture(scope="module")
def compiler() -> None:
    try:
        nvrtc.library()
    except NoNvrtc as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def listing() -> Callable[[bytes], str]:
    pytest.importorskip("triton", reason="the disassembler comes with triton")
    from sparsec.codegen.triton import sass

    return sass.listing


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_machine_code_uses_sparse_tensor_cores_and_spills_nothing(
    capability: int, dtype: str, listing: Callable[[bytes], str]
) -> None:
    for shape in shapes(dtype, "gelu", 1 << 20, capability):
        if (capability == 90 and shape.kind == "mma") or (dtype == "fp16" and shape.block_m != 128):
            continue  # sm_80 has shown the one, bf16 the other
        code = listing(prefill24.cubin(shape, capability))
        assert ("HGMMA.SP" if shape.kind == "wgmma" else "HMMA.SP.16832") in code, shape.name
        assert "STACK:0" in code, shape.name
        assert "LOCAL:0" in code, shape.name
        assert "LDL" not in code, shape.name
        assert code.count("WARPGROUP.ARRIVE") == (shape.kind == "wgmma"), (
            f"products of {shape.name} wait for each other"
        )
        assert "LDGSTS.E.BYPASS.128" in code, shape.name


@pytest.mark.usefixtures("compiler")
def test_a_text_that_does_not_compile_says_where() -> None:
    with pytest.raises(KernelCompileFailed, match=r"broken.cu\(2\): error"):
        nvrtc.compile("\nint f( {", "sm_80", "broken")


def test_a_missing_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    nvrtc.library.cache_clear()
    monkeypatch.setattr(nvrtc, "candidates", lambda: iter([Path("nowhere/libnvrtc.so")]))
    with pytest.raises(NoNvrtc, match="pip install nvidia-cuda-nvrtc"):
        nvrtc.library()
    nvrtc.library.cache_clear()


def test_few_rows_of_x_take_small_tiles_and_shared_memory_fits() -> None:
    assert shapes("bf16", "", 20, 80)[0].block_m == 32
    assert shapes("bf16", "", 4096, 90)[0].kind == "wgmma"
    assert max(shape.shared for shape in shapes("bf16", "", 64, 90)) <= 227 * 1024
    assert max(shape.shared for shape in shapes("bf16", "", 64, 89)) <= 99 * 1024
