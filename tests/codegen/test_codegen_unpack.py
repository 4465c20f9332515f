"""The loop "unpack" writes back exactly the weight that was packed, on every ISA, from any tile on."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.codegen.cpp import family, pack_verified
from sparsec.codegen.direct import Call
from sparsec.codegen.spec import Kernel, KernelSpec, Packed
from sparsec.formats import Format

Compiled = Callable[[KernelSpec], Kernel]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FORMATS = ("bitmap+fp32", "bitmap+bf16", "index+fp32", "index+bf16", "nm:2:4+fp32", "nm:1:8+bf16", "block:16x1+fp32",
           "block:4x1+bf16", "block:1x16+fp32")  # fmt: skip
SPECS = [KernelSpec(Format.parse(f), "unpack", Format.parse(f).values, isa)
         for f in FORMATS for isa in ("avx512", "avx2", "portable")]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(compile_all: Callable[[list[KernelSpec]], None]) -> None:
    compile_all(SPECS)


def weight_of(format: Format, n: int, k: int, density: float, seed: int) -> torch.Tensor:
    """[n, k] random values that hold the pattern."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g)
    if format.pattern.kind == "nm":
        keep, of = format.pattern.params
        order = torch.rand(n, -(-k // of), of, generator=g).argsort(2)
        kept = (order < keep).flatten(1)[:, :k] & (torch.rand(n, k, generator=g) < density)
    elif format.pattern.kind == "block":
        rows, cols = format.pattern.params
        blocks = torch.rand(-(-n // rows), -(-k // cols), generator=g) < density
        kept = blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
    else:
        kept = torch.rand(n, k, generator=g) < density
    return torch.where(kept, weight, torch.zeros(())).to(DTYPES[format.values])


def unpacked(kernel: Kernel, packed: Packed, tile: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of W from ``tile`` on, between rows of guard values that must stay."""
    n, k = packed.shape
    out = torch.full((n - 16 * tile + 2, k), 7.0, dtype=dtype)
    pointers = (ctypes.c_void_p * len(packed.tensors))(*(t.data_ptr() for t in packed.tensors))
    call = Call(y=out[1:].data_ptr(), y_stride=k, pack=pointers, m=16 * tile, n=n, k=k)
    run = ctypes.CFUNCTYPE(None, ctypes.POINTER(Call), ctypes.c_int64, ctypes.c_int64)(kernel.run)
    run(ctypes.byref(call), tile, packed.work.numel() - 1)
    assert bool((out[0] == 7).all())
    assert bool((out[-1] == 7).all())
    return out[1:-1]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.one_of(st.integers(1, 70), st.sampled_from([64, 65])),
    k=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 300])),
    density=st.sampled_from([0.0, 0.03, 0.3, 0.7, 1.0]),
    later=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpacking_gives_every_bit_back(
    spec: KernelSpec, compiled: Compiled, can_run: Callable[[KernelSpec], bool], kernel_cache: Path,
    n: int, k: int, density: float, later: bool, seed: int,
) -> None:  # fmt: skip
    kernel = compiled(spec)
    if not can_run(spec):
        pytest.skip(f"compiled; this machine cannot run {spec.isa}")
    weight = weight_of(spec.format, n, k, density, seed)
    packed = pack_verified(weight, spec.format, "test", kernel_cache)
    tile = (packed.work.numel() - 1) // 2 if later else 0
    assert torch.equal(unpacked(kernel, packed, tile, weight.dtype), weight[16 * tile :])
    assert torch.equal(family(spec.format.pattern.kind).unpack(packed), weight)
