"""Weights stored as codes: every pattern, value type, loop and ISA against plain PyTorch, and every pack proven."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.codegen import direct
from sparsec.codegen.cpp import family, loops_of, pack_verified
from sparsec.codegen.cpp.codes import codes_of
from sparsec.codegen.cpp.values import refusal
from sparsec.codegen.spec import ACTS, KernelSpec
from sparsec.errors import PatternMismatch
from sparsec.formats import BOOKS, Format, value_kind
from sparsec.passes.quantize.contract import Grid
from tests.codegen.samples import DTYPES, Compiled, assert_close, kept

PATTERNS = ["panel", "bitmap", "index", "nm:2:4", "nm:1:8", "block:16x1", "block:4x1", "block:1x16"]
VALUES = ["int8", "int8g32", "int8g128", "int4", "int4g32", "int4g64", "int4g128", "ternary", *BOOKS]
SLICED = ("index", "block:16x1", "block:4x1")


def taken(pattern: str, values: str) -> bool:
    return not (pattern in SLICED and refusal("sliced", values))


PAIRS = [f"{pattern}+{values}" for pattern in PATTERNS for values in VALUES if taken(pattern, values)]


def spec_of(text: str) -> KernelSpec:
    """``"index+int8 bf16 dot avx512 bf16_dot"``."""
    format, dtype, loop, isa, *rest = text.split()
    return KernelSpec(Format.parse(format), loop, dtype, isa, bf16_dot=bool(rest))


def _all() -> list[KernelSpec]:
    """Each pair of layout and values on the widest ISA; each width of code in each layout and loop on every ISA."""
    wide = [pair for pair in PAIRS if pair.partition("+")[0] in ("panel", "bitmap", "index", "block:1x16")]
    wide += ["nm:2:4+int8", "nm:2:4+int4g128", "nm:2:4+ternary", "nm:1:8+int4", "nm:1:8+codebook"]
    wide += ["block:16x1+int8g128", "block:16x1+ternary", "block:4x1+int4"]
    texts = [f"{pair} bf16 dot avx512 bf16_dot" for pair in wide]
    for values in ("int8", "int4", "ternary", "codebook", "codebook3"):
        for i, isa in enumerate(("avx512", "avx2", "portable")):
            here, there = ("fp32", "bf16") if (len(values) + i) % 2 else ("bf16", "fp32")
            texts += [f"{pattern}+{values} {here} dot {isa}" for pattern in ("panel", "bitmap")]
            texts += [f"{pattern}+{values} {there} outer {isa}" for pattern in ("panel", "bitmap")]
            rest = [pattern for pattern in ("block:1x16", "block:4x1") if taken(pattern, values)]
            texts += [f"{pattern}+{values} {here} {('outer', 'dot')[i % 2]} {isa}" for pattern in rest]
    texts += [f"{pattern}+int4g32 fp32 outer {isa}" for pattern, isa in (("panel", "avx512"), ("bitmap", "avx2"))]
    texts += [
        "block:1x16+int8g64 fp32 outer avx512",
        "index+int4g128 bf16 outer avx512",
        "nm:2:4+int4g32 fp32 dot avx2",
    ]
    texts += ["bitmap+int8g32 fp32 dot portable", "panel+int4g64 bf16 dot portable", "index+int8g128 fp32 dot avx2"]
    return [spec_of(text) for text in texts]


SPECS = _all()


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(compile_all: Callable[[list[KernelSpec]], None]) -> None:
    compile_all(SPECS)


def quantised(
    format: Format, n: int, k: int, density: float, seed: int, dtype: torch.dtype, symmetric: bool = True
) -> torch.Tensor:
    """A weight [n, k] that holds the pattern and lies on the values' grid."""
    generator = torch.Generator().manual_seed(seed)
    mask = kept(format, n, k, density, generator)
    kind, group = value_kind(format.values)
    if kind == "ternary":
        signs = torch.randint(0, 2, (n, k), generator=generator) * 2 - 1
        return (signs * mask * torch.rand(n, 1, generator=generator)).to(dtype)
    if kind in BOOKS:
        most = BOOKS[kind]
        levels = (torch.arange(most) - most // 2) * (0.5 + torch.rand(n, 1, generator=generator))
        levels[:, most // 2] = -0.0
        chosen = levels.gather(1, torch.randint(0, most, (n, k), generator=generator))
        return torch.where(mask, chosen, 0.0).to(dtype)
    wide = torch.randn(n, k, generator=generator) * mask
    if not symmetric:
        wide = wide.abs() + wide / 4
    return (
        Grid(8 if kind == "int8" else 4, group, symmetric).nearest(wide).to(dtype) if wide.numel() else wide.to(dtype)
    )


def meant(weight: torch.Tensor, format: Format) -> torch.Tensor:
    """The weight as kernels compute with it: q times scale, not rounded to the weight's dtype."""
    return codes_of(weight, format).weight(torch.float32) if weight.numel() else weight.float()


cases = st.fixed_dictionaries(
    {
        "m": st.sampled_from([0, 1, 2, 3, 5, 8, 17, 33, 64, 100]),
        "n": st.one_of(st.integers(0, 70), st.sampled_from([16, 64, 130])),
        "k": st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 255, 256, 300])),
        "density": st.sampled_from([0.0, 0.03, 0.1, 0.5, 1.0]),
        "act": st.sampled_from(ACTS),
        "bias": st.booleans(),
        "gap": st.sampled_from([0, 0, 1, 5]),
        "symmetric": st.booleans(),
        "outliers": st.sampled_from([0.0, 0.0, 0.01]),
        "seed": st.integers(0, 2**20),
    }
)


def with_outliers(weight: torch.Tensor, share: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(weight, where) with a share of its non-zeros replaced by large values."""
    generator = torch.Generator().manual_seed(seed)
    where = (torch.rand(weight.shape, generator=generator) < share) & (weight != 0)
    large = (50 + torch.rand(weight.shape, generator=generator)).to(weight.dtype)
    return torch.where(where, large, weight), where


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name.removeprefix("linear_"))
def test_a_coded_kernel_computes_the_reference(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)
    skewed = value_kind(spec.format.values)[0] == "int4" and str(spec.format.pattern) not in SLICED

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(cases)
    def check(case: dict[str, object]) -> None:
        m, n, k, seed = (int(str(case[name])) for name in ("m", "n", "k", "seed"))
        symmetric = bool(case["symmetric"]) or not skewed or spec.format.pattern.params == (1, 8)
        dtype = DTYPES[spec.dtype]
        weight = quantised(spec.format, n, k, float(str(case["density"])), seed, dtype, symmetric)
        exact = meant(weight, spec.format)
        # An outlier is told from its group's grid only where the group holds much besides it.
        if float(str(case["outliers"])) and k >= 255 and n >= 16 and float(str(case["density"])) >= 0.5:
            weight, where = with_outliers(weight, 0.01, seed)
            exact = torch.where(where, weight.float(), exact)
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(m, k + int(str(case["gap"])), generator=generator).to(dtype)[:, :k]
        bias = torch.randn(n, generator=generator).to(dtype) if case["bias"] else None
        packed = pack_verified(weight, spec.format, "test")
        y = direct.linear(kernel, packed, x, bias, str(case["act"]))
        if spec.dtype == "bf16" and not torch.equal(exact.bfloat16(), weight):
            pytest.fail("the exact weight does not round to the weight")
        assert_close(y, x, exact, bias, str(case["act"]))

    check()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
@pytest.mark.parametrize("pair", PAIRS)
def test_every_bit_of_a_coded_weight_comes_back(pair: str, dtype: torch.dtype) -> None:
    format = Format.parse(pair)
    for seed, (n, k, density) in enumerate(
        [(40, 300, 0.4), (17, 33, 0.1), (16, 128, 1.0), (1, 1, 1.0), (70, 257, 0.03)]
    ):
        weight = quantised(format, n, k, density, seed, dtype)
        packed = pack_verified(weight, format, "key")
        back = family(format.pattern.kind).unpack(packed)
        assert torch.equal(back, weight)  # of which -0.0 is a part
        assert (packed.format, packed.shape, packed.source_key) == (format, (n, k), "key")
        assert all(tensor.is_contiguous() for tensor in packed.tensors)
        assert packed.work.numel() == -(-n // 16) + 1
        assert bool((packed.work.diff() > 0).all())


@pytest.mark.parametrize("pair", PAIRS)
def test_a_coded_weight_without_rows_or_columns_is_packed(pair: str) -> None:
    format = Format.parse(pair)
    for n, k in ((0, 0), (0, 128), (5, 0), (1, 1), (17, 129)):
        weight = torch.zeros(n, k)
        packed = pack_verified(weight, format, "")
        assert torch.equal(family(format.pattern.kind).unpack(packed), weight)


@pytest.mark.parametrize("text", ["panel+int4g64 bf16 dot avx512 bf16_dot", "bitmap+int8g32 bf16 dot avx512 bf16_dot"])
def test_without_columns_there_is_only_the_bias(text: str, runnable: Compiled) -> None:
    spec = spec_of(text)
    kernel = runnable(spec)
    packed = pack_verified(torch.zeros(17, 0, dtype=torch.bfloat16), spec.format, "")
    bias = torch.arange(17).bfloat16()
    assert torch.equal(direct.linear(kernel, packed, torch.zeros(2, 0, dtype=torch.bfloat16), bias), bias.repeat(2, 1))


def test_zero_points_far_from_the_middle_are_stored_and_come_back() -> None:
    weight = torch.arange(16).repeat(16, 8).float() * 0.25  # codes 0 .. 15: no symmetric grid of 4 bits
    for pattern in ("panel", "bitmap", "block:1x16", "nm:2:4"):
        kept = weight * torch.tensor([0, 1.0, 0, 1]).repeat(32) if pattern == "nm:2:4" else weight
        packed = pack_verified(kept, Format.parse(f"{pattern}+int4g32"), "")
        assert int(codes_of(kept, packed.format).zero.max()) < 8
        assert torch.equal(family(packed.format.pattern.kind).unpack(packed), kept)
    with pytest.raises(PatternMismatch, match="zero points differ; bitmap takes them"):
        pack_verified(weight, Format.parse("index+int4g128"), "")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("index+codebook", "a codebook would be looked up by a gather"),
        ("block:4x1+codebook3", "a codebook3 would be looked up by a gather"),
        ("index+int4g32", "one scale a row, not one for 32 columns"),
        ("block:16x1+int8g64", "one scale a row, not one for 64 columns"),
        ("panel+int4g48", "groups of 48 are none of 32, 64 and 128"),
    ],
)
def test_a_pair_that_no_kernel_takes_is_refused_with_its_reason(text: str, why: str) -> None:
    format = Format.parse(text)
    with pytest.raises(PatternMismatch, match=why):
        pack_verified(torch.zeros(16, 128), format, "")
    with pytest.raises(PatternMismatch, match=why):
        family(format.pattern.kind).text(KernelSpec(format, "dot", "fp32", "avx512"))


def test_high_sparsity_nm_lies_in_a_bitmap_where_its_values_do_not_go_into_slices() -> None:
    sliced = pack_verified(
        quantised(Format.parse("nm:1:8+int8"), 16, 128, 1.0, 0, torch.float32), Format.parse("nm:1:8+int8"), ""
    )
    format = Format.parse("nm:1:8+codebook")
    bitmap = pack_verified(quantised(format, 16, 128, 1.0, 0, torch.float32), format, "")
    assert len(sliced.tensors) == 5 + 5
    assert len(bitmap.tensors) == 3 + 5


@pytest.mark.parametrize("values", ["int8", "int4g32", "ternary", "codebook"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(values: str, bad: float) -> None:
    weight = quantised(Format.parse(f"panel+{values}"), 16, 64, 1.0, 0, torch.float32)
    weight[3, 5] = bad
    with pytest.raises(PatternMismatch, match="stays dense"):
        pack_verified(weight, Format.parse(f"panel+{values}"), "")


@pytest.mark.parametrize("values", ["int8", "int4g32", "ternary"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_extreme_scales_are_computed_with(values: str, scale: float, runnable: Compiled) -> None:
    kernel = runnable(spec_of(f"panel+{values} bf16 dot avx512 bf16_dot"))
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randint(-1, 2, (16, 64), generator=generator) * scale).bfloat16()
    packed = pack_verified(weight, Format.parse(f"panel+{values}"), "")
    x = torch.randn(2, 64, generator=generator).bfloat16()
    exact = meant(weight, packed.format)
    y = direct.linear(kernel, packed, x).double()
    expected = x.double() @ exact.double().T
    rounding = (expected.abs() * 2**-8).clamp(min=2.0**-134)  # half a step of the smallest bf16
    assert float(((y - expected).abs() - rounding).max()) <= 1e-5 * scale


def test_rows_and_groups_of_zeros_have_codes_like_any() -> None:
    for values in ("int8", "int4g32", "ternary", "codebook"):
        for pattern in ("panel", "bitmap", "block:1x16"):
            weight = quantised(Format.parse(f"{pattern}+{values}"), 33, 130, 0.5, 2, torch.float32)
            weight[5] = 0
            weight[7, 32:96] = 0
            packed = pack_verified(weight, Format.parse(f"{pattern}+{values}"), "")
            assert torch.equal(family(packed.format.pattern.kind).unpack(packed), weight)


@pytest.mark.parametrize("values", ["int8", "int4g128", "ternary", *BOOKS])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))
def test_outliers_are_found_again_and_nothing_else_is_taken_for_one(values: str, dtype: torch.dtype) -> None:
    format = Format.parse(f"bitmap+{values}")
    clean = quantised(format, 64, 512, 0.5, 3, dtype)
    weight, where = with_outliers(clean, 0.01, 3)
    begin, place, value = pack_verified(weight, format, "").tensors[-3:]
    tile = torch.repeat_interleave(torch.arange(4), begin.diff())
    row = (16 * tile + place[:, 0])[:, None].expand(-1, 4)
    kept = value != 0
    assert int(begin[-1]) == len(place) == len(value)
    found = torch.stack([row[kept], place[:, 1:][kept]], 1)
    order = (found[:, 0] * 512 + found[:, 1]).argsort()
    assert torch.equal(found[order], where.nonzero())
    assert torch.equal(value[kept][order], weight[where])
    assert pack_verified(clean, format, "").tensors[-1].numel() == 0


def test_each_row_of_a_tile_has_its_first_outliers_before_any_has_its_second() -> None:
    """Sums that follow each other are of different rows; what fills a quad up is at a column that it has anyway."""
    format = Format.parse("panel+int8")
    clean = quantised(format, 40, 512, 1.0, 3, torch.float32)
    where = torch.zeros(40, 512, dtype=torch.bool)
    for row, columns in {0: 9, 1: 1, 2: 4, 15: 5, 33: 2}.items():
        where[row, 7 : 7 + 11 * columns : 11] = True
    packed = pack_verified(torch.where(where, 1e3 * clean.abs().amax(1, keepdim=True) + 0.25, clean), format, "")
    begin, place, value = packed.tensors[-3:]
    assert begin.tolist() == [0, 7, 7, 8]
    assert place[:, 0].tolist() == [0, 1, 2, 15, 0, 15, 0, 1]
    assert (value != 0).sum(1).tolist() == [4, 1, 4, 4, 4, 1, 1, 2]
    assert place[1].tolist() == [1, 7, 7, 7, 7]
    assert place[7].tolist() == [1, 7, 18, 7, 7]


def test_too_many_outliers_are_no_outliers() -> None:
    format = Format.parse("panel+int4g128")
    weight, _ = with_outliers(quantised(format, 64, 512, 1.0, 3, torch.float32), 0.08, 3)
    with pytest.raises(PatternMismatch, match="on no grid of 4 bits"):
        pack_verified(weight, format, "")


@pytest.mark.parametrize("loop", ["dot", "outer"])
def test_outliers_past_column_65535_are_added(loop: str, runnable: Compiled) -> None:
    spec = spec_of(f"bitmap+int8 {'fp32' if loop == 'dot' else 'bf16'} {loop} avx2")
    kernel = runnable(spec)
    weight = torch.zeros(16, 66_000, dtype=DTYPES[spec.dtype])
    weight[:, ::50] = 1.0
    weight[3, 65_999] = 0.375
    packed = pack_verified(weight, spec.format, "")
    assert packed.tensors[-2].dtype == torch.int32
    x = torch.zeros(3, 66_000, dtype=weight.dtype)
    x[:, 65_999] = torch.tensor([1.0, 2.0, 4.0]).to(x.dtype)
    assert direct.linear(kernel, packed, x)[:, 3].tolist() == [0.375, 0.75, 1.5]


def test_dense_codes_have_both_loops() -> None:
    assert loops_of(Format.parse("panel+int4g32")) == ("dot", "outer")
    assert loops_of(Format.parse("panel+bf16")) == ("dot",)
    assert loops_of(Format.parse("bitmap+int8")) == ("dot", "outer")


def test_codes_take_the_bytes_their_bits_say() -> None:
    for text, most in (
        ("panel+int8", 1.05),
        ("panel+int4g128", 0.57),
        ("panel+ternary", 0.27),
        ("panel+codebook2", 0.25 + 0.14),  # and 64 bytes of levels a row of 512
        ("panel+codebook3", 0.375 + 0.14),
        ("bitmap+codebook3", 0.125 + 0.375 / 2 + 0.13 + 0.02),
        ("bitmap+int4g128", 0.43),
    ):
        format = Format.parse(text)
        packed = pack_verified(quantised(format, 512, 512, 0.5, 0, torch.float32), format, "")
        assert packed.bytes / (512 * 512) <= most
