"""Prefill kernels on a CPU: their own text, with the instructions of ``emulated_device.h``."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

from sparsec.codegen.cuda import driver, prefill24
from sparsec.codegen.cuda.prefill24 import Shape
from sparsec.codegen.triton.quantize import ALIGNED, by_torch

EMULATION = Path(__file__).parent / "emulated_device.h"
# Runs a grid of blocks: x, values, metadata are the memory that may be read, with their sizes in bytes.
TAIL = """
extern "C" void emulate(const u16 *x, i64 x_bytes, const char *values, i64 value_bytes, const char *meta,
                        i64 meta_bytes, const u16 *bias, const float *scale, const float *x_scale, u16 *y,
                        i64 x_stride, i64 y_stride, int m, int n, int k, int rows, int wide, int blocks, int shared,
                        int is_late, int backward) {
  readable = {{(const char *)x, (const char *)x + x_bytes}, {values, values + value_bytes}, {meta, meta + meta_bytes}};
  late = is_late;
  body = [=] { prefill24(x, values, meta, bias, scale, x_scale, y, x_stride, y_stride, m, n, k, rows, wide); };
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
    """y by the emulated kernel, [M, N] in the shape's dtype. Memory around y must stay as it was.

    fp8: x is rounded to e4m3 as the reference of the kernel before it does.
    """
    m, n = len(x), len(weight)
    x_scale = None
    if shape.values:
        packed = prefill24.pack_fp8(weight, shape.kind)
        codes, x_scale = by_torch(x)
        x = torch.nn.functional.pad(codes.view(torch.uint8), (0, -x.shape[1] % ALIGNED)).view(codes.dtype)
    else:
        packed = prefill24.pack(weight, shape.kind)
    y = torch.full((m + 1, pitch or n), 7.0, dtype=weight.dtype)
    args = prefill24.arguments(packed, shape, x, y, bias, x_scale)
    x_used, *others = args
    assert isinstance(x_used, torch.Tensor)
    values, words = packed.tensors[:2]
    held = [(len(x_used) - 1) * x_used.stride(0) * 2 + x_used.shape[1] * 2, values.numel() * 2, words.numel() * 4]
    ranges = [part for of, size in zip(args[:3], held, strict=True) for part in driver.arguments([of, size])]
    blocks = [ctypes.c_int(number) for number in (shape.grid(m, n), shape.shared - 1024, late, backward)]
    emulated(shape).emulate(*ranges, *driver.arguments(others[2:]), *blocks)
    assert bool((y[m] == 7).all())
    assert bool((y[:m, n:] == 7).all())
    return y[:m, :n]
