"""Integer kernels against their meaning: x rounded to int8, dequantised, times the weight that the codes stand for."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.codegen import direct, reference
from sparsec.codegen.build import build
from sparsec.codegen.cpp import family, integer, pack_verified
from sparsec.codegen.cpp.codes import codes_of
from sparsec.codegen.spec import ACTS, Kernel, KernelSpec, Packed
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind
from sparsec.targets.base import Target

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Compiled = Callable[[KernelSpec], Kernel]


def spec_of(text: str) -> KernelSpec:
    """``"bitmap+int8 fp32 avx512"``."""
    format, dtype, isa = text.split()
    return KernelSpec(Format.parse(format), "dot", dtype, isa, x="int8")


FORMATS = [
    *("panel+int8", "panel+int8g64", "panel+int4", "panel+int4g32", "panel+ternary"),
    *("bitmap+int8", "bitmap+int8g32", "bitmap+int4g128", "bitmap+ternary"),
    *("nm:2:4+int8", "nm:2:4+int4g32", "nm:3:7+int8", "nm:1:2+ternary", "nm:2:4+int4g16"),
    *("index+int8", "index+int4g32", "index+int8g256", "nm:1:8+int8", "index+ternary"),
    *("block:16x1+int8", "block:4x1+int4g64", "block:2x3+int8", "block:16x16+int8", "block:1x16+int8g128"),
]
NARROW = [  # on the other ISAs: each decoder of positions and of values once
    *("panel+int8", "panel+int4g32", "panel+ternary", "bitmap+int8", "bitmap+int4g128", "nm:2:4+int8", "index+int8"),
    *("nm:2:4+int4g32", "index+int4g32", "block:16x1+int8", "block:4x1+int4g64", "block:16x16+int8"),
    *("block:1x16+int8g128",),
]
SPECS = [spec_of(f"{format} fp32 avx512") for format in FORMATS]
SPECS += [spec_of(f"{format} fp32 {isa}") for format in NARROW for isa in ("avx2", "portable")]
SPECS += [spec_of("bitmap+int8 bf16 avx512"), spec_of("panel+int4g32 bf16 avx512"), spec_of("index+int8 bf16 avx512")]


@pytest.fixture(scope="module")
def all_compiled(compile_all: Callable[[list[KernelSpec]], None]) -> None:
    compile_all(SPECS)


def every(test: Callable[..., None]) -> Callable[..., None]:
    """For each kernel, all of which are compiled first, two at a time."""
    given_each = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name.removeprefix("linear_"))
    chosen: Callable[..., None] = pytest.mark.usefixtures("all_compiled")(given_each(test))
    return chosen


def kept_by(format: Format, n: int, k: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """bool [n, k] that holds the pattern."""
    pattern = format.pattern
    if pattern.kind == "nm":
        keep, of = pattern.params
        order = torch.rand(n, -(-k // of), of, generator=generator).argsort(2)
        return (order < keep).flatten(1)[:, :k] & (torch.rand(n, k, generator=generator) < max(density, 0.5))
    rows, cols = pattern.params if pattern.kind == "block" else (1, 1)
    blocks = torch.rand(-(-n // rows), -(-k // cols), generator=generator) < density
    return blocks.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]


def weight_of(
    format: Format,
    n: int,
    k: int,
    density: float,
    generator: torch.Generator,
    shifted: bool = False,
    whole: bool = False,
) -> torch.Tensor:
    """[n, k] on the format's grid, with random scales; ``shifted``: with zero points (int4)."""
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
    return weight * kept_by(format, n, k, density, generator)


def assert_close(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32 sums may differ by 2e-6 of the sum of magnitudes; bf16 results by one rounding of the last bit."""
    allowed = 2e-6 * (reference.quantised(x).abs().double() @ weight.abs().double().T) + 2e-6 * expected.abs() + 1e-6
    if y.dtype == torch.bfloat16:
        allowed = allowed + expected.abs() * 2**-7
    worst = ((y.double() - expected.double()).abs() / allowed).nan_to_num(nan=1e9)
    assert y.shape == expected.shape
    assert worst.numel() == 0 or float(worst.max()) <= 1


cases = st.fixed_dictionaries(
    {
        "m": st.sampled_from([0, 1, 2, 3, 5, 8, 9, 16, 17, 33, 64, 70]),
        "n": st.one_of(st.integers(1, 70), st.sampled_from([16, 64, 65])),
        "k": st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 300, 512, 530])),
        "density": st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]),
        "act": st.sampled_from(ACTS),
        "bias": st.booleans(),
        "shifted": st.booleans(),
        "static": st.booleans(),
        "gap": st.sampled_from([0, 0, 3]),
        "seed": st.integers(0, 2**20),
    }
)


@every
def test_a_kernel_computes_the_reference(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(cases)
    def check(case: dict[str, object]) -> None:
        generator = torch.Generator().manual_seed(int(str(case["seed"])))
        m, n, k = (int(str(case[name])) for name in "mnk")
        shifted = bool(case["shifted"]) and "int4" in spec.format.values
        weight = weight_of(spec.format, n, k, float(str(case["density"])), generator, shifted)
        wide = torch.randn(m, k + int(str(case["gap"])), generator=generator).to(DTYPES[spec.dtype])
        x, act, scale = wide[:, :k], str(case["act"]), 0.03 if case["static"] else 0.0
        bias = torch.randn(n, generator=generator).to(x.dtype) if case["bias"] else None
        packed = pack_verified(weight, spec.format, "test", x="int8")
        y = direct.linear(kernel, packed, x, bias, act, scale)
        wide_bias = None if bias is None else bias.float()
        assert_close(y, x, weight, reference.linear(x.float(), weight, wide_bias, act, scale))

    check()


@every
def test_sums_are_those_of_int64(spec: KernelSpec, runnable: Compiled) -> None:
    """Sums of a group stay below 2^20, so a wrong unit in one would be more than fp32 may round."""
    kernel = runnable(spec)
    generator = torch.Generator().manual_seed(7)
    weight = weight_of(spec.format, 75, 285, 0.3, generator, "int4" in spec.format.values)
    packed = pack_verified(weight, spec.format, "test", x="int8")
    codes = codes_of(weight, spec.format)
    size = codes.group or 285
    q = torch.nn.functional.pad(codes.q, (0, -285 % size)).view(75, -1, size)
    for m in (1, 2, 3, 4, 7, 16, 31, 80):
        x = torch.randint(-127, 128, (m, 285), generator=generator)
        x[:, 0] = 127  # the scale of each row is 1
        parts = torch.nn.functional.pad(x, (0, -285 % size)).view(m, 1, -1, size) * q.long()
        sums = parts.sum(3)
        assert int(sums.abs().max()) < 2**20
        products = sums * codes.scale.double()
        y = direct.linear(kernel, packed, x.to(DTYPES[spec.dtype])).double()
        rounding = 2**-8 if spec.dtype == "bf16" else 2**-23
        allowed = 2**-23 * 2 * products.abs().sum(2) + rounding * products.sum(2).abs()
        assert bool(((y - products.sum(2)).abs() <= allowed).all())


def few(*formats: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", [s for s in SPECS if str(s.format) in formats], ids=lambda s: s.name)


some = few("bitmap+int8", "panel+int4g32", "nm:2:4+int8", "index+int8", "block:16x16+int8")


def packed_of(spec: KernelSpec, n: int, k: int, density: float = 0.5) -> tuple[torch.Tensor, Packed]:
    weight = weight_of(spec.format, n, k, density, torch.Generator().manual_seed(n + k))
    return weight, pack_verified(weight, spec.format, "test", x="int8")


@some
def test_any_split_of_the_tiles_gives_the_same_bits(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    _, packed = packed_of(spec, 200, 300)
    x = torch.randn(21, 300, generator=torch.Generator().manual_seed(3)).to(DTYPES[spec.dtype])
    whole = direct.linear(kernel, packed, x)
    tiles = packed.work.numel() - 1
    for cuts in ([0, 1, 2, tiles], [0, 5, 5, tiles], list(range(tiles + 1)), direct.bounds(packed, 3)):
        y = torch.full_like(whole, 77.0)
        direct.prepared(kernel, packed, x, None, "", y)(None, cuts)
        assert torch.equal(y, whole)


@some
def test_a_row_of_x_that_is_zero_gives_the_bias(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    _, packed = packed_of(spec, 33, 130)
    x = torch.randn(5, 130, generator=torch.Generator().manual_seed(4)).to(DTYPES[spec.dtype])
    x[1], x[4] = 0, -0.0
    bias = torch.arange(33).to(x.dtype)
    y = direct.linear(kernel, packed, x, bias)
    assert torch.equal(y[1], bias)
    assert torch.equal(y[4], bias)


@some
def test_what_is_not_finite_reaches_what_the_reference_says(spec: KernelSpec, runnable: Compiled) -> None:
    """A NaN makes its row NaN; an infinity too where the row gives the scale, else it is the largest number."""
    kernel = runnable(spec)
    weight, packed = packed_of(spec, 33, 130)
    for value, scale in itertools.product((torch.nan, torch.inf, -torch.inf), (0.0, 0.02)):
        for m in (1, 5, 20):
            x = torch.randn(m, 130, generator=torch.Generator().manual_seed(5)).to(DTYPES[spec.dtype])
            x[m // 2, 77] = value
            y = direct.linear(kernel, packed, x, x_scale=scale)
            expected = reference.linear(x.float(), weight, x_scale=scale)
            assert torch.equal(y.isnan(), expected.isnan())
            error = (y.float() - expected).abs().nan_to_num()
            rounding = 2**-7 if spec.dtype == "bf16" else 1e-5
            assert float(error.max()) <= float(expected.nan_to_num().abs().max()) * rounding


@some
def test_magnitudes_at_the_ends_of_fp32_are_rounded_as_torch_rounds_them(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    weight, packed = packed_of(spec, 17, 64)
    for size in (1e-44, 1e-38, 1e32):
        x = (torch.randn(3, 64, generator=torch.Generator().manual_seed(6)) * size).to(DTYPES[spec.dtype])
        expected = reference.linear(x.float(), weight, x_scale=0.0).to(x.dtype)
        error = (direct.linear(kernel, packed, x) - expected).float().abs()
        assert float(error.max()) <= 0.01 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_x_is_rounded_to_the_very_numbers_of_torch(dtype: str, runnable: Compiled) -> None:
    spec = spec_of(f"panel+int8 {dtype} avx512")
    kernel = runnable(spec)
    weight = torch.eye(64) * 127
    packed = pack_verified(weight, spec.format, "test", x="int8")
    x = torch.randn(40, 64, generator=torch.Generator().manual_seed(9)).to(DTYPES[dtype])
    x[3] = torch.arange(64) / 2 - 16  # halves, which go to the even neighbour
    x[3, 0] = 127
    s = x.float().abs().amax(1, keepdim=True) / 127
    q = (direct.linear(kernel, packed, x).float() / (127 * s)).round()
    assert torch.equal(q, (x.float() / s).round())


@pytest.mark.parametrize("text", ["bitmap+int8 fp32 avx512"])
def test_a_row_longer_than_one_int32_sum_is_whole(text: str, runnable: Compiled) -> None:
    spec = spec_of(text)
    weight = torch.full((16, 140_000), 127.0) * torch.linspace(1, 2, 16)[:, None]
    packed = pack_verified(weight, spec.format, "test", x="int8")
    y = direct.linear(runnable(spec), packed, torch.full((2, 140_000), -3.0))
    assert torch.allclose(y.double(), torch.full((2, 140_000), -3.0).double() @ weight.double().T, rtol=1e-5)


@every
def test_every_code_comes_back(spec: KernelSpec, runnable: Compiled) -> None:
    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        st.integers(1, 40), st.integers(1, 200), st.sampled_from([0.0, 0.3, 1.0]), st.booleans(), st.integers(0, 999)
    )
    def check(n: int, k: int, density: float, shifted: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight = weight_of(spec.format, n, k, density, generator, shifted and "int4" in spec.format.values)
        packed = pack_verified(weight, spec.format, "key", x="int8")
        assert torch.equal(family(spec.format.pattern.kind, "int8").unpack(packed), weight)
        assert all(tensor.is_contiguous() for tensor in packed.tensors)
        codes = codes_of(weight.bfloat16(), spec.format) if spec.format.values == "ternary" else None
        assert codes is None or torch.equal(codes.weight(torch.bfloat16), weight.bfloat16())

    check()


@pytest.fixture
def on_tiles(
    can_run: Callable[[KernelSpec], bool], kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Kernel]:
    """The AMX kernel of a format, on a machine without AMX too: plain C++ stands in for its instructions."""
    emulation = Path(__file__).with_name("emulated_tiles.h").read_text()
    real = integer.part

    def made(text: str) -> Kernel:
        spec = KernelSpec(Format.parse(text), "dot", "fp32", "avx512", x="int8", int_dot="amx")
        if not can_run(spec):
            pytest.skip("compiled by another test; this machine cannot run avx512 with integer dot products")
        monkeypatch.setattr(integer, "part", lambda name: (emulation if name == "int_amx.h" else "") + real(name))
        kernel = build(spec, kernel_cache / "emulated")
        assert "emulated_product" in kernel.source.read_text()
        return kernel

    return made


def products_of(kernel: Kernel) -> int:
    """Products of tiles since this was asked last."""
    return int(ctypes.CDLL(str(kernel.source.with_suffix(".so"))).emulated_products())


TILED = ("bitmap+int8", "panel+int8", "panel+int4g64", "panel+int8g32", "nm:2:4+ternary", "nm:2:4+int8",
         "nm:1:2+int4g64", "block:16x16+int8", "block:32x64+int4g64", "block:16x4+ternary")  # fmt: skip


@pytest.mark.parametrize("text", TILED)
def test_tiles_compute_the_reference(text: str, on_tiles: Callable[[str], Kernel]) -> None:
    kernel = on_tiles(text)
    spec = kernel.spec
    products_of(kernel)
    generator = torch.Generator().manual_seed(11)
    for n, k, m in [(16, 64, 16), (33, 70, 17), (75, 1285, 80), (48, 512, 64), (5, 1, 16)]:
        weight = weight_of(spec.format, n, k, 0.5, generator, "int4" in text)
        x = torch.randn(m, k, generator=generator)
        packed = pack_verified(weight, spec.format, "test", x="int8")
        assert_close(direct.linear(kernel, packed, x), x, weight, reference.linear(x, weight, x_scale=0.0))
    assert (products_of(kernel) > 0) == (value_kind(spec.format.values)[1] % 64 == 0)  # a product is with 64 columns


@pytest.mark.parametrize("text", ["block:16x16+int8", "block:32x32+int8", "block:16x64+int4g128"])
@pytest.mark.parametrize("m", [16, 48, 64, 70])
def test_only_tiles_that_keep_something_are_multiplied(text: str, m: int, on_tiles: Callable[[str], Kernel]) -> None:
    """A tile is 16 rows by 64 columns; one product is its own with 16 rows of x."""
    kernel = on_tiles(text)
    generator = torch.Generator().manual_seed(12)
    for n, k, density in [(64, 1024, 0.1), (96, 640, 0.4), (32, 256, 1.0), (32, 256, 0.0)]:
        weight = weight_of(kernel.spec.format, n, k, density, generator)
        x = torch.randn(m, k, generator=generator)
        packed = pack_verified(weight, kernel.spec.format, "test", x="int8")
        products_of(kernel)
        assert_close(direct.linear(kernel, packed, x), x, weight, reference.linear(x, weight, x_scale=0.0))
        kept = (weight.view(n // 16, 16, k // 64, 64) != 0).any(3).any(1)
        assert products_of(kernel) == int(kept.sum()) * (m // 16)


@pytest.mark.parametrize(
    ("text", "isa", "int_dot"),
    [
        *(("bitmap+int8", "avx512", "amx"), ("panel+int4g32", "avx512", "amx"), ("index+int8", "avx512", "amx")),
        *(("nm:2:4+int4", "avx512", "amx"), ("block:16x16+int8", "avx512", "amx"), ("nm:2:4+int8", "avx2", "vnni")),
        *(("bitmap+int8", "avx2", "vnni"), ("panel+int4g32", "avx2", "vnni"), ("index+int4", "avx2", "vnni")),
    ],
)
def test_what_few_machines_can_run_compiles_on_all(text: str, isa: str, int_dot: str, compiled: Compiled) -> None:
    spec = KernelSpec(Format.parse(text), "dot", "fp32", isa, x="int8", int_dot=int_dot)
    assert compiled(spec).source.exists()
    assert spec.name.endswith(f"_x8{int_dot}")


@pytest.mark.parametrize(
    ("isa", "has", "expected"),
    [
        *(("avx512", "amx", ("avx512", "amx")), ("avx512", "vnni", ("avx512", "")), ("avx512", "", ("avx2", ""))),
        *(("avx2", "vnni", ("avx2", "vnni")), ("avx2", "", ("avx2", "")), ("portable", "", ("portable", ""))),
    ],
)
def test_a_kernel_uses_what_its_machine_has(isa: str, has: str, expected: tuple[str, str]) -> None:
    target = Target("cpu", isa, True, 2, "a model", int_dot=has)
    spec = KernelSpec.on(target, Format.parse("bitmap+int8"), "dot", "bf16", "int8")
    assert (spec.isa, spec.int_dot) == expected
    assert not spec.bf16_dot


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("bitmap+fp32", "no whole numbers of equal distance"),
        ("bitmap+codebook", "no whole numbers of equal distance"),
        ("panel+int8g24", "groups of 24 columns are not a multiple of 16"),
        ("bitmap+int4", "on no grid of 4 bits"),
        ("nm:2:4+int8", "groups keep more than 2"),
    ],
)
def test_what_has_no_integer_kernel_is_refused_with_the_reason(text: str, reason: str) -> None:
    weight = torch.randint(-127, 128, (8, 64), generator=torch.Generator().manual_seed(1)).float()
    with pytest.raises(PatternMismatch, match=reason):
        pack_verified(weight, Format.parse(text), "", x="int8")


def test_a_weight_of_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="fp32 or bf16"):
        pack_verified(torch.zeros(4, 4, dtype=torch.float64), Format.parse("panel+int8"), "", x="int8")
