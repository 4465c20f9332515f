"""The loop "unpack" writes back exactly the weight that was packed, on every ISA, from any tile on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.codegen.cpp import family, pack_verified
from sparsec.codegen.cpp.codes import codes_of
from sparsec.codegen.spec import KernelSpec
from sparsec.formats import Format
from tests.codegen.samples import DTYPES, Compiled, kept, on_grid, unpacked

FORMATS = ("bitmap+fp32", "bitmap+bf16", "index+fp32", "index+bf16", "nm:2:4+fp32", "nm:1:8+bf16", "block:16x1+fp32",
           "block:4x1+bf16", "block:1x16+fp32")  # fmt: skip
SPECS = [KernelSpec(Format.parse(f), "unpack", Format.parse(f).values, isa)
         for f in FORMATS for isa in ("avx512", "avx2", "portable")]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(compile_all: Callable[[list[KernelSpec]], None]) -> None:
    compile_all([*SPECS, *INTEGER, *CODED])


def weight_of(format: Format, n: int, k: int, density: float, seed: int) -> torch.Tensor:
    """[n, k] random values that hold the pattern."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator)
    mask = kept(format, n, k, density, generator)
    return torch.where(mask, weight, torch.zeros(())).to(DTYPES[format.values])


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


INTEGER = [KernelSpec(Format.parse(f), "unpack", dtype, isa, x="int8")
           for f, dtype in (("panel+int8", "bf16"), ("bitmap+int8", "fp32"), ("nm:2:4+int4g32", "bf16"),
                            ("panel+ternary", "fp32"), ("index+int4g32", "fp32"), ("index+int8", "bf16"),
                            ("block:4x1+int4g64", "fp32"), ("block:16x16+int8", "fp32"),
                            ("block:1x16+int8g128", "bf16"))
           for isa in ("avx512", "avx2", "portable")]  # fmt: skip


@pytest.mark.parametrize("spec", INTEGER, ids=lambda s: s.name)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n=st.one_of(st.integers(1, 70), st.sampled_from([64, 65])),
    k=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 300, 530])),
    density=st.sampled_from([0.0, 0.03, 0.3, 0.7, 1.0]),
    shifted=st.booleans(),
    later=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_unpacking_what_integer_kernels_read_gives_every_bit_back(
    spec: KernelSpec, runnable: Compiled, n: int, k: int, density: float, shifted: bool, later: bool, seed: int
) -> None:
    kernel, generator = runnable(spec), torch.Generator().manual_seed(seed)
    weight = on_grid(spec.format, n, k, density, generator, shifted and "int4" in spec.format.values)
    if spec.dtype == "bf16":
        weight = (codes_of(weight, spec.format).q / 8).bfloat16()  # exact in bf16
    packed = pack_verified(weight, spec.format, "test", x="int8")
    tile = (packed.work.numel() - 1) // 2 if later else 0
    assert torch.equal(unpacked(kernel, packed, tile, weight.dtype), weight[16 * tile :])


CODED = [KernelSpec(Format.parse(f), "unpack", dtype, isa)
         for f, dtype in (("panel+int4g32", "fp32"), ("bitmap+int8", "bf16"), ("index+int8", "fp32"))
         for isa in ("avx512", "avx2", "portable")]  # fmt: skip


@pytest.mark.parametrize("spec", CODED, ids=lambda s: s.name)
@pytest.mark.parametrize("later", [False, True])
def test_outliers_come_back_to_their_places(spec: KernelSpec, later: bool, runnable: Compiled) -> None:
    kernel, generator = runnable(spec), torch.Generator().manual_seed(3)
    weight = on_grid(spec.format, 70, 600, 0.4, generator)
    if spec.dtype == "bf16":
        weight = (codes_of(weight, spec.format).q / 8).bfloat16()  # exact in bf16
    aside = torch.rand(weight.shape, generator=generator) < 0.005
    weight = torch.where(aside, (40 + 20 * torch.rand(weight.shape, generator=generator)).to(weight.dtype), weight)
    packed = pack_verified(weight, spec.format, "test")
    tile = (packed.work.numel() - 1) // 2 if later else 0
    assert int(packed.tensors[-3][-1]) > 0  # quads of outliers
    assert torch.equal(unpacked(kernel, packed, tile, weight.dtype), weight[16 * tile :])
