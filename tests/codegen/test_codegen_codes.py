"""Codes and scales are read off a weight exactly, or the weight is refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import grid
from sparsec.codegen.cpp import coded, family, pack_verified
from sparsec.codegen.cpp.codes import codes_of
from sparsec.errors import PatternMismatch
from sparsec.formats import BOOKS, Format
from sparsec.passes.profile.weights import profile
from sparsec.passes.quantize.contract import Grid


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.sampled_from([(8, 0, True), (8, 64, True), (4, 32, True), (4, 0, True), (4, 32, False), (4, 128, False)]),
    st.integers(1, 9), st.integers(1, 150), st.sampled_from([0.0, 0.2, 1.0]), st.integers(0, 2**16),
)  # fmt: skip
def test_a_rounded_weight_comes_back(grid: tuple[int, int, bool], n: int, k: int, density: float, seed: int) -> None:
    bits, group, symmetric = grid
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < density)
    left = Grid(bits, group, symmetric).nearest(weight)
    found = codes_of(left, Format.parse(f"bitmap+int{bits}" + (f"g{group}" if group else "")))
    assert torch.equal(found.weight(torch.float32), left)
    assert bool(((found.q == 0) == (left == 0)).all())
    size = found.group or k
    stored = found.q.int() + found.zero.int().repeat_interleave(size, 1)[:, :k]
    assert int(stored.min()) >= 0
    assert int(stored.max()) < 2**bits


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from([(8, 0), (8, 128), (4, 0), (4, 32)]), st.sampled_from([torch.bfloat16, torch.float16]),
    st.booleans(), st.integers(0, 2**16),
)  # fmt: skip
def test_products_that_16_bits_rounded_still_tell_their_scale(
    grid: tuple[int, int], dtype: torch.dtype, narrow: bool, seed: int
) -> None:
    bits, group = grid
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, 512, generator=generator) * 0.02 * (torch.rand(40, 512, generator=generator) < 0.5)
    parts = weight.view(40, -1, group or 512)
    scale = parts.abs().amax(2, keepdim=True) / (2 ** (bits - 1) - 1)
    scale = scale.to(dtype).float() if narrow else scale
    q = (parts / scale).round().clamp(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)
    left = (q * scale).view(40, 512).to(dtype)
    found = codes_of(left, Format.parse(f"panel+int{bits}" + (f"g{group}" if group else "")))
    assert torch.equal(found.weight(dtype), left)


def test_ternary_and_codebooks() -> None:
    torch.manual_seed(0)
    weight = torch.randint(-1, 2, (7, 33)) * torch.rand(7, 1)
    assert torch.equal(codes_of(weight, Format.parse("panel+ternary")).weight(torch.float32), weight)
    few = torch.randn(7, 16).gather(1, torch.randint(0, 16, (7, 200))).bfloat16()
    assert torch.equal(codes_of(few, Format.parse("panel+codebook")).weight(torch.bfloat16), few)


@pytest.mark.parametrize(("values", "most"), BOOKS.items())
@pytest.mark.parametrize("pattern", ["panel", "bitmap"])
def test_zeros_that_a_bitmap_leaves_out_take_no_level(pattern: str, values: str, most: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, most).gather(1, torch.randint(0, most, (7, 200))) * (torch.rand(7, 200) > 0.5)
    weight[2] = 0.0
    format = Format.parse(f"{pattern}+{values}")
    if pattern == "panel":
        with pytest.raises(PatternMismatch, match=f"more than {most} values"):
            codes_of(weight, format)
        return
    codes = codes_of(weight, format)
    assert torch.equal(codes.weight(torch.float32), weight)
    assert bool((codes.q[weight == 0] <= 0).all())
    assert codes.levels.shape == (7, 16)
    assert torch.equal(codes.levels, codes.levels[:, :most].repeat(1, 16 // most))
    packed = pack_verified(weight, format, "")
    assert torch.equal(family("bitmap").unpack(packed), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packing_takes_the_scales_that_profiling_found_and_proves_them(
    symmetric: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    weight = Grid(4, 32, symmetric).nearest(torch.randn(40, 256).abs() - 0.3).to(dtype)
    format, fact = Format.parse("panel+int4g32"), profile(weight)
    assert (fact.values.bits, fact.values.group, fact.values.exact) == (4, 32, True)
    expected = codes_of(weight, format)
    other = Grid(4, 32).nearest(torch.randn(40, 256)).to(dtype)

    def fails(*args: object, **keywords: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(grid, "_fit", fails)
    found = codes_of(weight, format, fact.key)
    assert torch.equal(found.weight(dtype), weight)
    assert torch.equal(found.scale, expected.scale)
    assert torch.equal(found.q, expected.q)
    for packs in ("", "int8"):
        pack_verified(weight, format, fact.key, x=packs)
    monkeypatch.undo()
    with contextlib.suppress(PatternMismatch):  # a key of other content gives no wrong codes
        assert torch.equal(codes_of(other, format, fact.key).weight(dtype), other)


def test_what_is_remembered_of_grids_is_bounded_by_its_bytes() -> None:
    known = grid.Known(most_bytes=1000)
    for i in range(5):
        known.remember(str(i), 4, 0, False, torch.ones(100))
    known.remember("none", 4, 0, False, None)
    known.remember("4", 4, 0, False, torch.zeros(100))  # in the place of what was there
    assert [known.look(str(i), 4, 0, False)[0] for i in range(5)] == [False, False, False, True, True]
    assert known.look("none", 4, 0, False) == (True, None)
    assert not known.look("4", 4, 0, True)[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 5), st.integers(1, 8), st.sampled_from([2, 3, 4]), st.integers(0, 99))
def test_codes_of_any_width_come_back_from_their_bytes(rows: int, units: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**width, (rows, 8 * units), generator=generator, dtype=torch.uint8)
    data = coded.to_bytes(codes, width)
    assert data.shape == (rows, units * width)
    assert torch.equal(coded.from_bytes(data, width), codes)
    whole = sum(int(c) << (width * i) for i, c in enumerate(codes[0].tolist())) if rows else 0
    assert not rows or bytes(data[0].tolist()) == whole.to_bytes(units * width, "little")


@pytest.mark.parametrize("values", ["int8", "int4g32", "ternary", *BOOKS])
def test_what_lies_on_no_grid_is_refused(values: str) -> None:
    weight = torch.randn(4, 64)
    with pytest.raises(PatternMismatch, match="stays dense"):
        codes_of(weight, Format.parse(f"panel+{values}"))
