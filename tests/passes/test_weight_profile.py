"""The weight profile against brute force: every count on every group, whatever the layout and dtype."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.facts import WeightFact
from sparsec.formats import VALUE_BITS, stored_types
from sparsec.passes.profile.weights import BLOCK_SHAPES, NM_SHAPES, VNM_SHAPES, content_key, profile

DENSITIES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0)


def random_weight(
    n: int, k: int, density: float, seed: int, dtype: torch.dtype = torch.float32, block: tuple[int, int] = (1, 1)
) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=g) < density
    mask = coarse.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    values = torch.randn(n, k, generator=g).to(dtype)
    values[values == 0] = 1
    return torch.where(mask, values, torch.zeros((), dtype=dtype))


def nm_mask(n: int, k: int, keep: int, of: int, seed: int) -> torch.Tensor:
    scores = torch.rand(n, -(-k // of), of, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(2, scores.topk(keep, dim=2).indices, True)
    return mask.reshape(n, -1)[:, :k]


def brute_nm(w: torch.Tensor, n: int, m: int) -> tuple[int, int]:
    groups = [g for row in (w != 0) for g in row.split(m)]
    return len(groups), sum(int(g.sum()) > n for g in groups)


def brute_vnm(w: torch.Tensor, v: int, n: int, m: int) -> tuple[int, int]:
    blocks = [b for band in (w != 0).split(v) for b in band.split(m, dim=1)]
    return len(blocks), sum(int(b.any(0).sum()) > 4 or int(b.sum(1).max()) > n for b in blocks)


def brute_block(w: torch.Tensor, rows: int, cols: int) -> tuple[int, int, float]:
    blocks = [b for band in (w != 0).split(rows) for b in band.split(cols, dim=1)]
    used = [b for b in blocks if b.any()]
    return len(blocks), len(used), sum(int(b.sum()) for b in used) / max(sum(b.numel() for b in used), 1)


def check_against_brute_force(w: torch.Tensor, fact: WeightFact) -> None:
    mask = w != 0
    rows = mask.sum(1)
    assert (fact.n, fact.k, fact.nnz) == (*w.shape, int(mask.sum()))
    assert (fact.row_nnz_min, fact.row_nnz_max) == (int(rows.min()), int(rows.max()))
    assert fact.zero_rows == int((rows == 0).sum())
    assert fact.zero_cols == int((mask.sum(0) == 0).sum())
    tenths = [min(int(r) * 10 // w.shape[1], 9) for r in rows]
    assert fact.row_hist == tuple(tenths.count(i) for i in range(10))
    for nm in fact.nm:
        assert (nm.groups, nm.violations) == brute_nm(w, nm.n, nm.m)
    for vnm in fact.vnm:
        assert (vnm.blocks, vnm.violations) == brute_vnm(w, vnm.v, vnm.n, vnm.m)
    for b in fact.blocks:
        total, used, fill = brute_block(w, b.rows, b.cols)
        assert (b.total, b.nonzero) == (total, used)
        assert b.fill == pytest.approx(fill)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 70),
    k=st.integers(1, 150),
    density=st.sampled_from(DENSITIES),
    block=st.sampled_from([(1, 1), (16, 1), (4, 4), (1, 16), (3, 5)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 2**20),
)
def test_every_reported_count_is_the_brute_force_count(
    n: int, k: int, density: float, block: tuple[int, int], dtype: torch.dtype, seed: int
) -> None:
    w = random_weight(n, k, density, seed, dtype, block)
    check_against_brute_force(w, profile(w))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([s for s in NM_SHAPES if s != (3, 4) and s != (6, 8)]),
    n=st.integers(8, 40),
    k=st.integers(64, 200),
    seed=st.integers(0, 2**20),
)
def test_an_exact_nm_weight_is_found_and_its_tightest_pattern_comes_first(
    shape: tuple[int, int], n: int, k: int, seed: int
) -> None:
    w = random_weight(n, k, 1.0, seed) * nm_mask(n, k, *shape, seed)
    fact = profile(w)
    found = fact.nm_fact(*shape)
    assert found is not None
    assert found.exact
    assert fact.nm[0].n / fact.nm[0].m <= shape[0] / shape[1]
    check_against_brute_force(w, fact)


def test_one_bad_group_makes_two_four_near_and_not_exact() -> None:
    w = random_weight(64, 128, 1.0, 0) * nm_mask(64, 128, 2, 4, 0)
    w[5, 40:44] = 1.0
    found = profile(w).nm_fact(2, 4)
    assert found is not None
    assert (found.violations, found.groups, found.exact) == (1, 64 * 32, False)


def test_a_dense_weight_and_an_all_zero_one_have_no_pattern() -> None:
    for w in (random_weight(64, 64, 1.0, 1), torch.zeros(64, 64)):
        fact = profile(w)
        assert (fact.nm, fact.vnm, fact.blocks) == ((), (), ())


@pytest.mark.parametrize("density", [0.05, 0.1, 0.3, 0.5, 0.7])
def test_a_random_mask_has_no_pattern_beyond_being_unstructured(density: float) -> None:
    fact = profile(random_weight(256, 512, density, 3))
    assert (fact.nm, fact.vnm, fact.blocks) == ((), (), ())


def test_a_sparse_weight_that_keeps_two_of_four_everywhere_is_still_exact() -> None:
    w = random_weight(640, 512, 0.1, 4) * nm_mask(640, 512, 2, 4, 40)
    assert 0.04 < w.count_nonzero() / w.numel() < 0.06
    found = profile(w).nm_fact(2, 4)
    assert found is not None
    assert found.exact


@pytest.mark.parametrize("m", [8, 16, 32])
@pytest.mark.parametrize("v", [32, 128])
def test_vnm_is_found_with_its_tallest_block(v: int, m: int) -> None:
    n, k = 256, 96
    mask = torch.zeros(n, k, dtype=torch.bool)
    g = torch.Generator().manual_seed(7)
    for top in range(0, n, v):
        for left in range(0, k, m):
            four = torch.randperm(m, generator=g)[:4]
            for row in range(top, top + v):
                mask[row, left + four[torch.randperm(4, generator=g)[:2]]] = True
    w = random_weight(n, k, 1.0, 8) * mask
    found = [f for f in profile(w).vnm if f.m == m]
    assert [(f.v, f.n, f.exact) for f in found] == [(v, 2, True)]
    check_against_brute_force(w, profile(w))


def test_vnm_shapes_are_tallest_first() -> None:
    assert list(VNM_SHAPES) == sorted(VNM_SHAPES, key=lambda s: (s[2], -s[0]))


@pytest.mark.parametrize("shape", [s for s in BLOCK_SHAPES if s != (64, 64)])
def test_blocks_of_every_shape_are_found_full(shape: tuple[int, int]) -> None:
    w = random_weight(128, 160, 0.3, 9, block=shape)
    found = profile(w).block_fact(*shape)
    assert found is not None
    assert found.fill == 1.0
    assert found.nonzero < found.total
    check_against_brute_force(w, profile(w))


def test_equal_rows_are_recovered() -> None:
    scores = torch.rand(40, 100, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(40, 100, dtype=torch.bool).scatter_(1, scores.topk(37, dim=1).indices, True)
    fact = profile(random_weight(40, 100, 1.0, 10) * mask)
    assert fact.rows_equal
    assert fact.row_nnz_max == 37


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), k=st.integers(1, 60), seed=st.integers(0, 2**20))
def test_the_thumbnail_is_the_mean_density_of_its_cells(n: int, k: int, seed: int) -> None:
    w = random_weight(n, k, 0.4, seed)
    fact = profile(w)
    mask = (w != 0).float()
    for i in range(16):
        for j in range(16):
            band = mask[i * n // 16 : max((i + 1) * n // 16, i * n // 16 + 1)]
            cell = band[:, j * k // 16 : max((j + 1) * k // 16, j * k // 16 + 1)]
            assert abs(fact.thumbnail[16 * i + j] - 100 * float(cell.mean())) <= 0.501


def layouts(w: torch.Tensor) -> dict[str, torch.Tensor]:
    wide = torch.zeros(w.shape[0], 2 * w.shape[1], dtype=w.dtype)
    wide[:, ::2] = w
    with torch.inference_mode():
        inference = w.clone()
    return {
        "contiguous": w.clone(),
        "transposed": w.t().contiguous().t(),
        "strided": wide[:, ::2],
        "inference": inference,
        "parameter": torch.nn.Parameter(w.clone()),
        "leaf that needs a gradient": w.clone().requires_grad_(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layout_and_grad_mode_change_neither_key_nor_fact(dtype: torch.dtype) -> None:
    w = random_weight(96, 130, 0.4, 11, dtype)
    keys = {name: content_key(view) for name, view in layouts(w).items()}
    assert len(set(keys.values())) == 1, keys
    facts = {name: profile(view) for name, view in layouts(w).items()}
    assert len(set(facts.values())) == 1
    check_against_brute_force(w, facts["transposed"])


def test_the_key_tells_dtype_shape_and_every_value_apart() -> None:
    w = random_weight(64, 96, 0.4, 12)
    changed = w.clone()
    changed[63, 95] += 1
    minus = torch.where(w == 0, -0.0, w)
    others = [w.double(), w.reshape(96, 64), changed, minus, w.t(), w[:63]]
    assert len({content_key(t) for t in (w, *others)}) == 1 + len(others)
    assert content_key(torch.empty(0, 4)) != content_key(torch.empty(0, 5))


def test_the_key_does_not_depend_on_the_number_of_threads() -> None:
    w = random_weight(700, 4096, 0.4, 13)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = content_key(w)
    finally:
        torch.set_num_threads(before)
    assert one == content_key(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_negative_zeros_are_zeros_and_are_counted(dtype: torch.dtype) -> None:
    w = random_weight(33, 65, 0.5, 14, dtype)
    zeros = int((w == 0).sum())
    fact = profile(torch.where(w == 0, torch.tensor(-0.0, dtype=dtype), w))
    assert fact.negative_zeros == zeros
    assert fact.nnz == w.numel() - zeros
    assert profile(w).negative_zeros == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_values_are_kept_and_counted(bad: float, dtype: torch.dtype) -> None:
    w = random_weight(30, 64, 0.5, 15, dtype)
    w[3, 5] = w[29, 63] = bad
    fact = profile(w)
    assert fact.nonfinite == 2
    check_against_brute_force(w, fact)


def test_finite_values_whose_sum_overflows_are_not_called_non_finite() -> None:
    assert profile(torch.full((8, 64), 3e38)).nonfinite == 0


def quantized(w: torch.Tensor, bits: int, group: int, symmetric: bool) -> torch.Tensor:
    rows = w.reshape(-1, group)
    if symmetric:
        scale = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        return ((rows / scale).round() * scale).reshape(w.shape)
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    scale = (high - low) / (2**bits - 1)
    zero = (-low / scale).round()
    return (((rows / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale).reshape(w.shape)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 128, 512])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(3, torch.float32), (4, torch.float32), (8, torch.float32), (3, torch.bfloat16), (4, torch.bfloat16)],
)
def test_an_integer_grid_is_recovered_with_bits_and_group(
    bits: int, dtype: torch.dtype, group: int, symmetric: bool
) -> None:
    w = torch.randn(96, 512, generator=torch.Generator().manual_seed(16))
    for keep in (1.0, 0.4):
        masked = quantized(w, bits, group, symmetric) * random_weight(96, 512, keep, 17).ne(0)
        found = profile(masked.to(dtype)).values
        assert (found.kind, found.group) == ("grid", 0 if group == 512 else group)
        assert found.bits == bits


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 64),
    k=st.integers(1, 200),
    density=st.sampled_from(DENSITIES),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    spread=st.sampled_from(["normal", "uniform", "positive"]),
    seed=st.integers(0, 2**20),
)
def test_random_floats_are_never_a_grid(
    n: int, k: int, density: float, dtype: torch.dtype, spread: str, seed: int
) -> None:
    w = random_weight(n, k, density, seed)
    if spread == "uniform":
        w = torch.where(w == 0, w, torch.rand(n, k, generator=torch.Generator().manual_seed(seed)) - 0.5)
    if spread == "positive":
        w = torch.where(w == 0, w, w.abs() + 1)
    assert profile(w.to(dtype)).values.kind in ("real", "codebook" if dtype == torch.bfloat16 else "real")
    if w.count_nonzero() < 8:
        assert profile(w).values.kind == "real" or w.count_nonzero() == 1


def test_ternary_weights_are_recognised_with_one_scale_and_with_one_a_row() -> None:
    signs = torch.randint(-1, 2, (64, 128), generator=torch.Generator().manual_seed(18)).float()
    assert profile(0.37 * signs).values.kind == "ternary"
    per_row = profile(torch.rand(64, 1) * signs + 0 * signs).values
    assert (per_row.kind, per_row.group) == ("ternary", 0)


def test_a_codebook_without_a_grid_keeps_its_number_of_levels() -> None:
    table = torch.randn(13, generator=torch.Generator().manual_seed(19))
    picks = torch.randint(0, 13, (64, 128), generator=torch.Generator().manual_seed(20))
    found = profile(table[picks] * random_weight(64, 128, 0.5, 21).ne(0)).values
    assert (found.kind, found.levels) == ("codebook", 13)


@pytest.mark.parametrize("most", [3, 4, 7, 8, 15, 16])
@pytest.mark.parametrize("density", [0.4, 1.0])
def test_rows_with_levels_of_their_own_are_codebooks_of_the_bits_that_hold_them(most: int, density: float) -> None:
    g = torch.Generator().manual_seed(most)
    weight = torch.randn(64, most, generator=g).gather(1, torch.randint(0, most, (64, 512), generator=g))
    weight *= torch.rand(64, 512, generator=g) < density
    found = profile(weight).values
    assert (found.kind, found.row_levels) == ("codebook", most)
    for zeros in (False, True):
        bits = 2 if most + zeros <= 4 else 3 if most + zeros <= 8 else 4 if most + zeros <= 16 else 0
        types = stored_types(found, zeros)
        assert (VALUE_BITS[types[0]] if types else 0) == bits
        assert not types or types[-1] == "codebook"  # GPUs have no other


def test_seventeen_levels_in_one_row_are_no_book() -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 12, generator=g).gather(1, torch.randint(0, 12, (64, 512), generator=g))
    weight[40] = torch.randn(17, generator=g)[torch.arange(512) % 17]
    assert profile(weight).values.row_levels == 0
    assert (
        profile(torch.randn(64, 12, generator=g)).values.row_levels == 0
    )  # 12 columns are 12 levels, whatever they hold


def test_grids_of_few_steps_are_books_of_fewer_bits_too() -> None:
    g = torch.Generator().manual_seed(2)
    steps = torch.randint(-1, 3, (64, 512), generator=g)
    found = profile(steps * torch.rand(64, 1, generator=g)).values
    assert (found.kind, found.row_levels) == ("grid", 3)
    assert stored_types(found) == ("codebook2", "int4")
    grouped = profile((steps.view(64, 4, 128) * torch.rand(64, 4, 1, generator=g)).view(64, 512)).values
    assert stored_types(grouped) == ("int4g128",)  # a book would need 12 levels


def test_a_level_outside_the_sampled_rows_is_still_found() -> None:
    w = torch.ones(1000, 64)
    w[7, 9] = 3.3
    w[501, 2] = 1.7
    assert profile(w).values.levels == 3


def test_facts_are_hashable_and_json_able() -> None:
    fact = profile(random_weight(64, 64, 0.3, 22, block=(16, 1)))
    assert hash(fact) == hash(dataclasses.replace(fact))
    assert json.loads(json.dumps(dataclasses.asdict(fact)))["nnz"] == fact.nnz


def test_equal_contents_are_profiled_once() -> None:
    w = random_weight(64, 64, 0.3, 23)
    assert profile(w) is profile(w.clone())


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (1, 1)])
def test_empty_and_single_weights_are_profiled(shape: tuple[int, int]) -> None:
    fact = profile(torch.zeros(shape))
    assert (fact.n, fact.k, fact.nnz, fact.density) == (*shape, 0, 0.0)
    assert len(fact.thumbnail) == 256


def test_a_weight_that_is_no_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        profile(torch.zeros(3))
