"""Loops of activation sparsity against their meaning: a part of the weight is read, and the answer is whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparsec.codegen import direct, reference
from sparsec.codegen.cpp import pack_verified
from sparsec.codegen.spec import ACTS, Kernel, KernelSpec
from sparsec.errors import PatternMismatch
from sparsec.formats import Format, value_kind

Compiled = Callable[[KernelSpec], Kernel]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LEVELS = {"int8": 127, "int4": 7, "ternary": 1, "codebook": 7, "codebook2": 1, "codebook3": 3}


def spec_of(text: str) -> KernelSpec:
    """``"bitmap+int8 skip fp32 avx512"``; with ``bf16_dot`` at the end."""
    format, loop, dtype, isa, *rest = text.split()
    return KernelSpec(Format.parse(format), loop, dtype, isa, bf16_dot=bool(rest))


SPECS = [
    spec_of(text)
    for text in (
        "panel+fp32 skip fp32 avx512", "panel+bf16 skip bf16 avx512", "panel+bf16 skip bf16 avx2",
        "panel+fp32 skip fp32 portable", "panel+int8 skip fp32 avx512", "panel+int8g128 skip fp32 avx2",
        "panel+int4g32 skip fp32 avx512", "panel+int4g128 skip bf16 avx512", "panel+ternary skip fp32 avx512",
        "panel+int4 skip fp32 portable", "bitmap+fp32 skip fp32 avx512", "bitmap+bf16 skip bf16 avx512",
        "bitmap+bf16 skip bf16 avx2", "bitmap+fp32 skip fp32 portable", "bitmap+int8 skip fp32 avx512",
        "bitmap+int4g128 skip fp32 avx512", "bitmap+int8 skip fp32 portable", "nm:2:4+fp32 skip fp32 avx512",
        "block:16x16+fp32 skip fp32 avx512",
        "panel+fp32 select fp32 avx512", "panel+bf16 select bf16 avx512 bf16_dot", "panel+bf16 select bf16 avx2",
        "panel+fp32 select fp32 portable", "panel+int8 select fp32 avx512", "panel+int4g32 select bf16 avx512 bf16_dot",
        "panel+codebook select fp32 avx2", "panel+codebook2 select fp32 avx512", "bitmap+codebook3 select fp32 avx512",
        "panel+int4 select fp32 portable", "bitmap+fp32 select fp32 avx512",
        "bitmap+bf16 select bf16 avx512 bf16_dot", "bitmap+int8 select fp32 avx512", "bitmap+int4g64 select fp32 avx2",
        "bitmap+ternary select fp32 portable", "nm:2:4+bf16 select bf16 avx2",
    )
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _compile_ahead(compile_all: Callable[[list[KernelSpec]], None]) -> None:
    compile_all(SPECS)


def weight_for(spec: KernelSpec, n: int, k: int, density: float, generator: torch.Generator) -> torch.Tensor:
    """Whole numbers [n, k] on the grid of the format, each group with its largest, that hold the pattern."""
    kind, group = value_kind(spec.format.values)
    top = LEVELS.get(kind, 8)
    weight = torch.randint(-top, top + 1, (n, k), generator=generator).float()
    pattern = spec.format.pattern
    if pattern.kind == "nm":
        keep, of = pattern.params
        order = torch.rand(n, -(-k // of), of, generator=generator).argsort(2)
        weight = weight * (order < keep).flatten(1)[:, :k]
    elif pattern.kind != "panel":
        rows, cols = pattern.params or (1, 1)
        kept = torch.rand(-(-n // rows), -(-k // cols), generator=generator) < density
        weight = weight * kept.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
    if kind in LEVELS and not kind.startswith("codebook"):
        weight[:, :: group or max(k, 1)] = top
    return weight.to(DTYPES[spec.dtype])


cases = st.fixed_dictionaries(
    {
        "m": st.sampled_from([0, 1, 1, 2, 3, 5, 8]),
        "n": st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 300, 2100])),
        "k": st.one_of(st.integers(0, 70), st.sampled_from([127, 128, 129, 256, 300])),
        "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        "left": st.sampled_from([0.0, 0.05, 0.3, 0.8, 1.0]),
        "act": st.sampled_from(ACTS),
        "bias": st.booleans(),
        "gap": st.sampled_from([0, 3]),
        "seed": st.integers(0, 2**20),
    }
)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name.removeprefix("linear_"))
def test_reading_a_part_of_the_weight_gives_the_reference(spec: KernelSpec, runnable: Compiled) -> None:
    kernel = runnable(spec)

    @settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(cases)
    def check(case: dict[str, object]) -> None:
        generator = torch.Generator().manual_seed(int(str(case["seed"])))
        m, n, k = (int(str(case[name])) for name in "mnk")
        left, act = float(str(case["left"])), str(case["act"])
        weight = weight_for(spec, n, k, float(str(case["density"])), generator)
        x = torch.randint(-8, 9, (m, k + int(str(case["gap"]))), generator=generator)[:, :k].to(weight.dtype)
        bias = torch.randint(-50, 50, (n,), generator=generator).to(x.dtype) if case["bias"] else None
        packed = pack_verified(weight, spec.format, "test", loop=spec.loop)
        if spec.loop == "skip":
            x *= torch.rand(m, k, generator=generator) < left
            y = direct.linear(kernel, packed, x, bias, act)
            wanted = torch.ones(n, dtype=torch.bool)
        else:
            wanted = torch.rand(n, generator=generator) < left
            active = wanted.nonzero()[:, 0].to(torch.int32)
            y = direct.linear(kernel, packed, x, bias, act, active=active, weight=weight)
        expected = reference.linear(x, weight, bias, act)
        assert bool((y[:, ~wanted] == 0).all())
        if act in ("", "relu"):  # sums of whole numbers are exact
            assert torch.equal(y[:, wanted], expected[:, wanted])
        torch.testing.assert_close(y[:, wanted], expected[:, wanted], rtol=2**-7, atol=1e-3)

    check()


def test_nan_in_x_is_a_value_and_reaches_every_output(runnable: Compiled) -> None:
    spec = spec_of("panel+fp32 skip fp32 avx512")
    weight = torch.ones(20, 40)
    x = torch.zeros(2, 40)
    x[1, 7] = float("nan")
    y = direct.linear(runnable(spec), pack_verified(weight, spec.format, "test", loop="skip"), x)
    assert bool((y[0] == 0).all())
    assert bool(y[1].isnan().all())


def test_minus_zero_in_x_is_skipped() -> None:
    x = torch.tensor([[0.0, -0.0, 1.0, float("inf")], [0.0, 0.0, 0.0, -2.0]])
    assert reference.active_columns(x).tolist() == [2, 3]


@pytest.mark.parametrize("values", ["int4g32", "codebook", "codebook2", "codebook3"])
def test_what_lanes_of_rows_cannot_hold_is_refused_in_a_sentence(values: str) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(0, 16, (8, 64), generator=generator).float()  # zero points differ
    weight[:, ::32], weight[:, 1::32] = 0, 15
    if values.startswith("codebook"):
        weight = weight % 3
    with pytest.raises(PatternMismatch, match=r"zero points differ|levels of its own"):
        pack_verified(weight, Format.parse(f"panel+{values}"), "test", loop="skip")


@pytest.mark.parametrize(
    "text",
    [
        "panel+int8 skip fp32 avx512",
        "bitmap+int4g128 skip fp32 avx512",
        "panel+int8 select fp32 avx512",
        "panel+int4g32 select bf16 avx512 bf16_dot",
        "bitmap+int4g64 select fp32 avx2",
        "bitmap+ternary select fp32 portable",
    ],
)
def test_outliers_beside_codes_are_not_left_out(text: str, runnable: Compiled) -> None:
    spec, generator = spec_of(text), torch.Generator().manual_seed(5)
    kernel = runnable(spec)
    weight = weight_for(spec, 70, 640, 0.5, generator)
    aside = torch.rand(weight.shape, generator=generator) < 0.004
    aside[:, ::32] = False  # these tell the scale
    weight = torch.where(aside, (1000 + 8 * torch.rand(weight.shape, generator=generator)).to(weight.dtype), weight)
    packed = pack_verified(weight, spec.format, "test", loop=spec.loop)
    active = torch.tensor([0, 1, 15, 16, 17, 40, 69], dtype=torch.int32)
    wanted = active.long() if spec.loop == "select" else torch.arange(70)
    for m in (1, 3, 8):
        x = torch.randint(-3, 4, (m, 640), generator=generator).to(weight.dtype)
        y = direct.linear(kernel, packed, x, active=active if spec.loop == "select" else None)
        expected = reference.linear(x, weight)
        torch.testing.assert_close(y[:, wanted], expected[:, wanted], rtol=2**-7, atol=0.5)
