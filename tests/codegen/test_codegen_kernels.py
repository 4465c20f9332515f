"""Every kernel against the plain-PyTorch meaning: patterns x loops x value types x ISAs, over odd shapes."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.codegen import direct, reference
from sparsec.codegen.cpp import FAMILIES, family, pack_verified
from sparsec.codegen.spec import ACTS, KernelSpec
from sparsec.formats import PATTERN_KINDS, Format
from tests.codegen.samples import DTYPES, Compiled, assert_close, kept


def spec_of(text: str) -> KernelSpec:
    """``"index+bf16 dot avx512 bf16_dot"``."""
    format, loop, isa, *rest = text.split()
    chosen = Format.parse(format)
    return KernelSpec(chosen, loop, chosen.values, isa, bf16_dot=bool(rest))


def _all() -> list[KernelSpec]:
    texts = [
        f"{pattern}+{values} {loop} {isa}"
        for pattern in ("bitmap", "index")
        for values in ("fp32", "bf16")
        for loop in ("dot", "outer")
        for isa in ("avx512", "avx2", "portable")
    ]
    texts += [
        f"{pattern}+bf16 dot avx512 bf16_dot" for pattern in ("bitmap", "index", "nm:2:4", "block:16x1", "block:1x16")
    ]
    texts += ["nm:2:4+fp32 dot avx512", "nm:8:16+bf16 outer avx512", "nm:2:4+fp32 dot avx2", "nm:4:8+bf16 dot portable"]
    texts += ["nm:3:32+fp32 dot avx512", "nm:1:4+bf16 dot avx2", "nm:2:3+fp32 outer avx512", "nm:5:7+fp32 dot avx512"]
    texts += ["block:16x1+fp32 dot avx512", "block:16x1+fp32 outer avx512", "block:4x1+bf16 dot avx512 bf16_dot"]
    texts += ["block:4x1+bf16 dot avx2", "block:8x1+fp32 dot avx2", "block:2x2+fp32 outer portable"]
    texts += ["block:16x16+fp32 dot portable", "block:3x3+fp32 dot avx512"]
    texts += ["block:1x16+fp32 dot avx512", "block:1x16+fp32 outer avx512", "block:1x32+bf16 dot avx2"]
    texts += ["block:1x16+bf16 outer portable"]
    texts += [
        "panel+fp32 dot avx512",
        "panel+bf16 dot avx512 bf16_dot",
        "panel+bf16 dot avx2",
        "panel+fp32 dot portable",
    ]
    return [spec_of(text) for text in texts]


SPECS = _all()


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(compile_all: Callable[[list[KernelSpec]], None]) -> None:
    compile_all(SPECS)


def sparse_weight(format: Format, n: int, k: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """[n, k] whole numbers of -8 .. 8 that hold the pattern: products and sums of them are exact in fp32."""
    weight = torch.randint(1, 9, (n, k), generator=generator) * (
        torch.randint(0, 2, (n, k), generator=generator) * 2 - 1
    )
    return (weight * kept(format, n, k, density, generator)).to(DTYPES[format.values])


cases = st.fixed_dictionaries(
    {
        "m": st.sampled_from([0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 100]),
        "n": st.one_of(st.integers(0, 70), st.sampled_from([16, 64, 65, 130])),
        "k": st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 255, 256, 300])),
        "density": st.sampled_from([0.0, 0.03, 0.1, 0.3, 0.5, 0.9, 1.0]),
        "act": st.sampled_from(ACTS),
        "bias": st.booleans(),
        "gap": st.sampled_from([0, 0, 1, 5]),
        "seed": st.integers(0, 2**20),
    }
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name.removeprefix("linear_"))
def test_a_kernel_computes_the_reference(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(cases)
    def check(case: dict[str, object]) -> None:
        generator = torch.Generator().manual_seed(int(str(case["seed"])))
        m, n, k = (int(str(case[name])) for name in "mnk")
        weight = sparse_weight(spec.format, n, k, float(str(case["density"])), generator)
        wide = torch.randn(m, k + int(str(case["gap"])), generator=generator).to(DTYPES[spec.dtype])
        x = wide[:, :k]
        bias = torch.randn(n, generator=generator).to(x.dtype) if case["bias"] else None
        packed = pack_verified(weight, spec.format, "test")
        y = direct.linear(kernel, packed, x, bias, str(case["act"]))
        assert_close(y, x, weight, bias, str(case["act"]))

    check()


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name.removeprefix("linear_"))
def test_whole_numbers_come_out_exactly(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    generator = torch.Generator().manual_seed(7)
    weight = sparse_weight(spec.format, 75, 285, 0.3, generator)
    packed = pack_verified(weight, spec.format, "test")
    for m in (1, 2, 3, 4, 7, 16, 31, 80):
        x = torch.randint(-8, 9, (m, 285), generator=generator).to(weight.dtype)
        bias = torch.randint(-50, 50, (75,), generator=generator).to(weight.dtype)
        assert torch.equal(direct.linear(kernel, packed, x, bias), reference.linear(x, weight, bias))


SOME = [
    "bitmap+fp32 dot avx512",
    "bitmap+bf16 outer avx2",
    "index+bf16 dot avx512 bf16_dot",
    "index+fp32 outer avx512",
    "index+fp32 dot portable",
    "nm:2:4+bf16 dot avx512 bf16_dot",
    "block:4x1+bf16 dot avx2",
    "block:1x16+fp32 outer avx512",
]
some = pytest.mark.parametrize("spec", [spec_of(text) for text in SOME], ids=SOME)


@some
def test_any_split_of_the_tiles_gives_the_same_bits(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    generator = torch.Generator().manual_seed(3)
    weight = sparse_weight(spec.format, 200, 300, 0.2, generator)
    packed = pack_verified(weight, spec.format, "test")
    x = torch.randn(21, 300, generator=generator).to(weight.dtype)
    whole = direct.linear(kernel, packed, x)
    tiles = packed.work.numel() - 1
    for cuts in ([0, 1, 2, tiles], [0, 5, 5, tiles], list(range(tiles + 1)), direct.bounds(packed, 3)):
        y = torch.full_like(whole, 77.0)
        call = direct.prepared(kernel, packed, x, None, "", y)
        call(None, cuts)
        assert torch.equal(y, whole)


@some
def test_nothing_outside_the_result_is_written(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    generator = torch.Generator().manual_seed(4)
    weight = sparse_weight(spec.format, 37, 140, 0.2, generator)
    packed = pack_verified(weight, spec.format, "test")
    x = torch.randn(19, 140, generator=generator).to(weight.dtype)
    around = torch.full((21, 50), 77.0, dtype=x.dtype)
    direct.prepared(kernel, packed, x, None, "", around[1:20, 3:40])()
    assert_close(around[1:20, 3:40], x, weight, None, "")
    around[1:20, 3:40] = 77.0
    assert bool((around == 77.0).all())


@some
def test_a_nan_in_x_reaches_every_output_that_keeps_its_position(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    generator = torch.Generator().manual_seed(5)
    weight = sparse_weight(spec.format, 48, 160, 0.3, generator)
    packed = pack_verified(weight, spec.format, "test")
    for m, act in itertools.product((1, 20), ACTS):
        x = torch.randn(m, 160, generator=generator).to(weight.dtype)
        x[0, 13] = float("nan")
        y = direct.linear(kernel, packed, x, act=act)
        assert bool(y[0][weight[:, 13] != 0].isnan().all())
        assert not bool(y[1:].isnan().any())


@some
def test_nan_and_infinite_weights_are_computed_with(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    weight = sparse_weight(spec.format, 32, 64, 1.0, torch.Generator().manual_seed(6))
    row, column = (int(i) for i in weight.nonzero()[5])
    for special in (float("nan"), float("inf"), float("-inf")):
        weight[row, column] = special
        packed = pack_verified(weight, spec.format, "test")
        x = torch.ones(3, 64, dtype=weight.dtype)
        y = direct.linear(kernel, packed, x)
        assert torch.equal(y.isnan(), reference.linear(x, weight).isnan())
        assert torch.equal(y.isinf(), reference.linear(x, weight).isinf())


@pytest.mark.parametrize("text", ["index+fp32 dot avx512", "index+bf16 outer avx2", "bitmap+fp32 dot avx2"])
def test_more_than_65535_columns_are_addressed(text: str, runnable: Compiled) -> None:
    spec = spec_of(text)
    kernel = runnable(spec)
    generator = torch.Generator().manual_seed(8)
    weight = sparse_weight(spec.format, 18, 70_001, 0.01, generator)
    weight[:, -1] = 3
    packed = pack_verified(weight, spec.format, "test")
    x = torch.randint(-3, 4, (2, 70_001), generator=generator).to(weight.dtype)
    assert torch.equal(direct.linear(kernel, packed, x), reference.linear(x, weight))


@pytest.mark.parametrize("text", ["index+fp32 outer avx512", "index+fp32 dot avx2", "index+fp32 dot portable"])
def test_activations_are_as_exact_as_torch(text: str, runnable: Compiled) -> None:
    kernel = runnable(spec_of(text))
    packed = pack_verified(torch.eye(16), spec_of(text).format, "test")
    x = torch.cat([torch.linspace(-100, 100, 40_000), torch.linspace(-6, 6, 40_000), torch.zeros(16)]).view(-1, 16)
    for act in ACTS:
        expected = reference.ACT[act](x.double())
        error = (direct.linear(kernel, packed, x, act=act).double() - expected).abs()
        assert float((error / (expected.abs() + x.abs() * 0.3 + 1e-3)).max()) < 1e-6


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_bf16_results_are_rounded_to_nearest_even(isa: str, runnable: Compiled) -> None:
    spec = spec_of(f"index+bf16 dot {isa}")
    kernel = runnable(spec)
    weight = torch.zeros(16, 2, dtype=torch.bfloat16)
    weight[:, 0] = 1
    weight[:, 1] = 2**-8  # half of the last bit of values in [1, 2)
    x = torch.stack([1 + torch.arange(128) / 128, torch.ones(128)], dim=1).to(torch.bfloat16)
    y = direct.linear(kernel, pack_verified(weight, spec.format, "test"), x)
    assert torch.equal(y, reference.linear(x, weight))


def test_every_family_gives_a_text_for_every_loop_and_isa() -> None:
    assert set(FAMILIES) == set(PATTERN_KINDS) - {"dense", "vnm"}  # V:N:M is for GPUs
    for kind, values in itertools.product(FAMILIES, ("fp32", "bf16")):
        for loop, isa in itertools.product(family(kind).loops, ("avx512", "avx2", "portable")):
            spec = KernelSpec(Format.parse(f"{kind}+{values}"), loop, values, isa)
            text = family(kind).text(spec)
            assert spec.name in text
            assert text == family(kind).text(spec)
            assert '#include "' not in text  # one file says everything


def test_the_call_struct_is_the_one_in_the_header() -> None:
    names = [name for name, _ in direct.Call._fields_]
    first = ["x", "x_stride", "y", "y_stride", "bias", "pack", "scratch", "m", "n", "k", "act", "x_scale"]
    assert names == [*first, "active", "active_count"]
    assert ctypes.sizeof(direct.Call) == 13 * 8


@pytest.mark.parametrize("text", ["index+fp32 outer avx512", "index+bf16 outer avx2", "index+fp32 outer portable",
                                  "block:4x1+fp32 outer avx512", "block:1x16+fp32 outer avx512"])  # fmt: skip
def test_zero_values_meet_no_memory_that_was_never_written(text: str, runnable: Compiled) -> None:
    """Lists are filled up with zeros whose columns may lie past the end of x, and 0 times NaN is NaN."""
    spec = spec_of(text)
    kernel = runnable(spec)
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight = sparse_weight(spec.format, 48, 160, 0.05, generator)
        x = torch.randn(3, 160, generator=generator).to(weight.dtype)
        y = direct.linear(kernel, pack_verified(weight, spec.format, "test"), x)
        assert_close(y, x, weight, None, "")
