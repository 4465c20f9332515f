"""Packing: what is kept comes back bit by bit, and what does not hold a pattern is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.codegen import direct
from sparsec.codegen.cpp import family, pack_verified, packer
from sparsec.codegen.spec import Packed
from sparsec.errors import PatternMismatch, RoundTripMismatch
from sparsec.formats import Format, Pattern

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
ANY_PATTERN = ["bitmap", "index", "block:16x1", "block:4x1", "block:1x16", "block:16x16", "block:3x5", "block:6x2"]


@pytest.fixture(autouse=True)
def _packer_in_the_session_cache(kernel_cache: Path) -> None:
    """The packer is compiled into the session's cache, not the user's."""


SPECIAL = [float("nan"), float("inf"), float("-inf"), -0.0, 1e-39, -1e-40]


def random_bits(n: int, k: int, dtype: torch.dtype, density: float, seed: int) -> torch.Tensor:
    """Any bit pattern at all where something is kept, a tenth of them special; zeros of both signs between."""
    generator = torch.Generator().manual_seed(seed)
    limit = 2**31 if dtype == torch.float32 else 2**15
    weight = torch.randint(-limit, limit, (n, k), generator=generator).to(BITS[dtype]).view(dtype)
    special = torch.tensor(SPECIAL, dtype=dtype)[torch.randint(0, len(SPECIAL), (n, k), generator=generator)]
    weight = torch.where(torch.rand(n, k, generator=generator) < 0.1, special, weight)
    zero = torch.where(torch.rand(n, k, generator=generator) < 0.1, -0.0, 0.0).to(dtype)
    return torch.where(torch.rand(n, k, generator=generator) < density, weight, zero)


@pytest.mark.parametrize("values", ["fp32", "bf16"])
@pytest.mark.parametrize("pattern", ANY_PATTERN)
def test_every_bit_comes_back_but_the_sign_of_a_zero(pattern: str, values: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(
        st.integers(0, 70), st.sampled_from([0, 1, 15, 16, 31, 33, 64, 127, 128, 129, 260]),
        st.sampled_from([0.0, 0.05, 0.5, 1.0]), st.integers(0, 2**20),
    )  # fmt: skip
    def check(n: int, k: int, density: float, seed: int) -> None:
        weight = random_bits(n, k, DTYPES[values], density, seed)
        format = Format.parse(f"{pattern}+{values}")
        packed = pack_verified(weight, format, "key")
        back = family(format.pattern.kind).unpack(packed)
        same = back.view(BITS[weight.dtype]) == weight.view(BITS[weight.dtype])
        assert bool((same | ((weight == 0) & (back == 0))).all())
        assert (packed.format, packed.shape, packed.source_key) == (format, (n, k), "key")
        assert all(tensor.is_contiguous() for tensor in packed.tensors)

    check()


@pytest.mark.parametrize("text", ["nm:2:4", "nm:4:8", "nm:8:16", "nm:1:4", "nm:3:32", "nm:1:16", "nm:2:3", "nm:17:300"])
@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_nm_weights_come_back_whatever_n_and_m(text: str, values: str) -> None:
    pattern = Pattern.parse(text)
    keep, of = pattern.params
    for seed, (n, k) in enumerate([(16, 4 * of), (5, 3 * of + 1), (33, 2 * of - 1), (0, of), (4, 0)]):
        groups = -(-k // of)
        order = torch.rand(n, groups, of, generator=torch.Generator().manual_seed(seed)).argsort(2).flatten(1)[:, :k]
        weight = random_bits(n, k, DTYPES[values], 1.0, seed).masked_fill(order >= keep, 0.0)
        packed = pack_verified(weight, Format(pattern, values), "")
        back = family("nm").unpack(packed)
        same = back.view(BITS[weight.dtype]) == weight.view(BITS[weight.dtype])
        assert bool((same | ((weight == 0) & (back == 0))).all())


def test_one_bad_group_makes_a_weight_not_2_4() -> None:
    weight = torch.tensor([1.0, 0, 2.0, 0]).repeat(32, 64)
    pack_verified(weight, Format.parse("nm:2:4"), "")
    weight[17, 41] = 3.0
    with pytest.raises(PatternMismatch, match=r"1 of 2048 groups keep more than 2, the first in row 17 from column 40"):
        pack_verified(weight, Format.parse("nm:2:4"), "")
    with pytest.raises(PatternMismatch, match="5 of 4 cannot be kept"):
        pack_verified(weight, Format.parse("nm:5:4"), "")


def test_groups_of_2_4_always_store_two_values() -> None:
    weight = torch.zeros(16, 64)
    weight[3, 5] = 1.0
    packed = pack_verified(weight, Format.parse("nm:2:4"), "")
    masks, values, start = packed.tensors
    assert int(start[-1]) == 16 * 64 // 2 == values.numel() - packer.PAD_BYTES // 4
    assert {bin(mask & 0xFFFFFFFF).count("1") for mask in masks.tolist()} == {16}


def test_a_negative_zero_may_lose_its_sign_and_nothing_else_may_change(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, float("nan")]]).repeat(16, 8)
    chosen = family("bitmap")
    honest = chosen.unpack
    for place, lie in ((2, 0.0), (0, 1.0), (3, 0.0), (2, -1.0)):

        def lying(packed: Packed, place: int = place, lie: float = lie) -> torch.Tensor:
            back = honest(packed)
            back[0, place] = lie
            return back

        pack_verified(weight, Format.parse("bitmap"), "")
        with monkeypatch.context() as patch:
            patch.setattr(type(chosen), "unpack", lambda self, packed, lying=lying: lying(packed))
            with pytest.raises(RoundTripMismatch, match=rf"1 values, the first in row 0, column {place}"):
                pack_verified(weight, Format.parse("bitmap"), "")


@pytest.mark.parametrize("pattern", ["bitmap", "index", "nm:2:4", "block:1x16"])
def test_a_weight_may_have_any_strides(pattern: str) -> None:
    weight = torch.tensor([1.0, 0, 2.0, 0]).repeat(64, 32)
    turned = weight.t().contiguous().t()
    assert not turned.is_contiguous()
    packed = pack_verified(turned, Format.parse(pattern), "")
    assert torch.equal(family(packed.format.pattern.kind).unpack(packed), weight)


def test_a_dtype_that_is_not_the_formats_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16 weight"):
        pack_verified(torch.zeros(4, 4), Format.parse("bitmap+bf16"), "")
    with pytest.raises(ValueError, match=r"\[N, K\]"):
        pack_verified(torch.zeros(4, 4, 4), Format.parse("index+fp32"), "")


@pytest.mark.parametrize("pattern", ["bitmap", "index", "nm:2:4", "block:16x1", "block:1x16"])
def test_work_rises_with_every_tile_and_splits_evenly(pattern: str) -> None:
    weight = torch.zeros(1000, 256)
    weight[:250, ::2] = 1.0  # the first quarter holds everything
    packed = pack_verified(weight, Format.parse(pattern), "")
    tiles = -(-1000 // 16)
    assert packed.work.dtype == torch.int64
    assert packed.work.numel() == tiles + 1
    assert int(packed.work[0]) == 0
    assert bool((packed.work.diff() > 0).all())
    first, middle, last = direct.bounds(packed, 2)
    assert (first, last) == (0, tiles)
    heaviest = int(packed.work.diff().max())
    assert abs(int(packed.work[middle]) * 2 - int(packed.work[-1])) <= 2 * heaviest


def test_packing_is_the_same_on_any_number_of_threads() -> None:
    weight = torch.where(torch.rand(300, 500) < 0.3, torch.randn(300, 500), torch.tensor(0.0))
    before = torch.get_num_threads()
    try:
        packs = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packs.append([pack_verified(weight, Format.parse(text), "") for text in ("bitmap", "index")])
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*packs, strict=True):
        used = [t.numel() - (packer.PAD_BYTES if t.dtype == torch.uint8 else 0) for t in one.tensors]
        assert all(torch.equal(a[:n], b[:n]) for a, b, n in zip(one.tensors, other.tensors, used, strict=True))
