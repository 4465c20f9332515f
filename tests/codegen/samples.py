"""What tests of kernels have in common: masks that hold a pattern, weights on a grid, and how near a result must be."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch

from sparsec.codegen import reference
from sparsec.codegen.direct import Call
from sparsec.codegen.spec import Kernel, KernelSpec, Packed
from sparsec.formats import Format, value_kind

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Compiled = Callable[[KernelSpec], Kernel]


def kept(format: Format, n: int, k: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """bool [n, k] that holds the pattern; N:M keeps at least half of what it may."""
    pattern = format.pattern
    if pattern.kind == "nm":
        keep, of = pattern.params
        order = torch.rand(n, -(-k // of), of, generator=generator).argsort(2)
        return (order < keep).flatten(1)[:, :k] & (torch.rand(n, k, generator=generator) < max(density, 0.5))
    rows, cols = pattern.params if pattern.kind == "block" else (1, 1)
    blocks = torch.rand(-(-n // rows), -(-k // cols), generator=generator) < density
    return blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]


def on_grid(
    format: Format, n: int, k: int, density: float, generator: torch.Generator, shifted: bool = False
) -> torch.Tensor:
    """fp32 [n, k] of integers times random scales, of int8, int4 or ternary; ``shifted``: with zero points (int4)."""
    kind, group = value_kind(format.values)
    top = {"int8": 127, "int4": 7, "ternary": 1}[kind]
    size = group or k
    groups = -(-k // size)
    zero = torch.randint(0, 9, (n, groups), generator=generator) if shifted else torch.full((n, groups), top)
    low, high = -zero, 2 * top - zero
    q = torch.randint(0, 2 * top + 1, (n, groups * size), generator=generator).view(n, groups, size) - zero[..., None]
    q[:, :, 0], q[:, :, -1] = low, high  # the ends of the grid are used, so that its scale can be told
    scale = 2.0 ** torch.randint(-4, 4, (n, groups), generator=generator)
    scale = scale * (1 + torch.rand(n, groups, generator=generator))
    weight = (q * scale[..., None]).reshape(n, -1)[:, :k]
    return weight * kept(format, n, k, density, generator)


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, act: str) -> None:
    """fp32 sums may differ by 2e-6 of the sum of magnitudes; bf16 results by one rounding of the last bit."""
    expected = reference.linear(x.float(), weight, None if bias is None else bias.float(), act)
    size = x.abs().double() @ weight.abs().double().T + (0 if bias is None else bias.abs().double())
    assert_within(y, expected, 2e-6 * size + 1e-6, 2**-8)


def assert_within(y: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor, last_bit: float) -> None:
    """``last_bit``: what a result in bf16 may be off besides, as a share of it."""
    if y.dtype == torch.bfloat16:
        allowed = allowed + expected.abs() * last_bit
    worst = ((y.double() - expected.double()).abs() / allowed).nan_to_num(nan=1e9)
    assert y.shape == expected.shape
    assert worst.numel() == 0 or float(worst.max()) <= 1


def unpacked(kernel: Kernel, packed: Packed, tile: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of W from ``tile`` on as a kernel of the loop "unpack" writes them, between guard values that must stay."""
    n, k = packed.shape
    out = torch.full((n - 16 * tile + 2, k), 7.0, dtype=dtype)
    pointers = (ctypes.c_void_p * len(packed.tensors))(*(t.data_ptr() for t in packed.tensors))
    call = Call(y=out[1:].data_ptr(), y_stride=k, pack=pointers, m=16 * tile, n=n, k=k)
    run = ctypes.CFUNCTYPE(None, ctypes.POINTER(Call), ctypes.c_int64, ctypes.c_int64)(kernel.run)
    run(ctypes.byref(call), tile, packed.work.numel() - 1)
    assert bool((out[0] == 7).all())
    assert bool((out[-1] == 7).all())
    return out[1:-1]
