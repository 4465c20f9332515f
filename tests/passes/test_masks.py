"""Selection: exact quotas, whole groups, deterministic ties; and the contract between methods and selection."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import BadPattern, UnknownMethod
from sparsec.passes.gates.contract import NEEDS as GATE_NEEDS
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.allocate.contract import Learns, Measures
from sparsec.passes.masks.contract import (
    SCOPES,
    STATISTICS,
    Choose,
    Pruned,
    Scores,
    Statistics,
    Updates,
    prune,
)
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector, select, select_pool
from sparsec.passes.masks.structure.contract import NEEDS

unhurried = settings(deadline=None)  # a busy machine is no failure
sparsities = st.floats(0, 0.999)


@st.composite
def scores(draw: st.DrawFn, rows: int = 24, cols: int = 40) -> torch.Tensor:
    """Score matrices with many ties, some zero, any sign."""
    n, k = draw(st.integers(1, rows)), draw(st.integers(1, cols))
    levels = draw(st.sampled_from([1, 2, 5, 10_000]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = generator.integers(-levels // 3, levels, size=(n, k)) / 7.0
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


def pruned_of(size: int, sparsity: float) -> int:
    return min(size, math.floor(sparsity * size + 0.5))


def reference_order(score: torch.Tensor) -> list[int]:
    """Flat places from best to worst; among equals the lower place is better."""
    flat = score.float().flatten().tolist()
    return sorted(range(len(flat)), key=lambda i: (-flat[i], i))


@unhurried
@given(scores(), sparsities)
def test_a_layer_keeps_exactly_its_best_scores(score: torch.Tensor, sparsity: float) -> None:
    keep = select(score, MaskPattern(), sparsity)
    kept = score.numel() - pruned_of(score.numel(), sparsity)
    expected = torch.zeros(score.numel(), dtype=torch.bool)
    expected[reference_order(score)[:kept]] = True
    assert torch.equal(keep.flatten(), expected)


@unhurried
@given(scores(), sparsities)
def test_every_row_keeps_exactly_its_best_scores(score: torch.Tensor, sparsity: float) -> None:
    keep = select(score, MaskPattern(), sparsity, "row")
    for row, mask in zip(score, keep, strict=True):
        kept = row.numel() - pruned_of(row.numel(), sparsity)
        assert sorted(mask.nonzero().flatten().tolist()) == sorted(reference_order(row)[:kept])


@unhurried
@given(st.lists(scores(), min_size=1, max_size=4), sparsities)
def test_a_pool_keeps_the_best_of_all_its_layers(layers: list[torch.Tensor], sparsity: float) -> None:
    choosers = select_pool([(lambda s=score: s) for score in layers], MaskPattern(), sparsity)
    keep = torch.cat([choose(score).flatten() for choose, score in zip(choosers, layers, strict=True)])
    together = torch.cat([score.float().flatten() for score in layers])
    kept = together.numel() - pruned_of(together.numel(), sparsity)
    expected = torch.zeros(together.numel(), dtype=torch.bool)
    expected[reference_order(together)[:kept]] = True
    assert torch.equal(keep, expected)


@unhurried
@given(scores(), st.integers(1, 40).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m + 1))))
def test_every_group_keeps_exactly_n_of_m_and_the_last_what_it_has(score: torch.Tensor, nm: tuple[int, int]) -> None:
    n, m = nm
    keep = select(score, MaskPattern("nm", nm), 0.0)
    for begin in range(0, score.shape[1], m):
        part, mask = score[:, begin : begin + m], keep[:, begin : begin + m]
        kept = min(n, part.shape[1])
        for row, row_mask in zip(part, mask, strict=True):
            assert sorted(row_mask.nonzero().flatten().tolist()) == sorted(reference_order(row)[:kept])


@unhurried
@given(scores(), st.integers(1, 9), st.integers(1, 4), st.integers(5, 12), st.sampled_from(["l2", "sum"]))
def test_vnm_blocks_use_four_columns_and_rows_keep_n_of_them(
    score: torch.Tensor, v: int, n: int, m: int, norm: str
) -> None:
    score = score.abs()
    keep = select(score, MaskPattern("vnm", (v, n, m)), 0.0, norm=norm)
    for top in range(0, score.shape[0], v):
        for left in range(0, score.shape[1], m):
            part, mask = score[top : top + v, left : left + m].float(), keep[top : top + v, left : left + m]
            used = mask.any(0)
            assert int(used.sum()) <= 4
            assert mask.sum(1).tolist() == [min(n, part.shape[1])] * len(mask)
            worth = (part.square() if norm == "l2" else part).sum(0)
            if not bool(used.all()):  # no column that was passed over beats the worst of the four chosen
                best_four = worth.sort(descending=True).values[:4]
                assert float(worth[used].min()) >= float(best_four[-1]) - 1e-4 * float(worth.max())


@unhurried
@given(scores(), st.integers(1, 9), st.integers(1, 9), sparsities, st.sampled_from(["layer", "row"]))
def test_blocks_go_or_stay_whole_with_an_exact_count(
    score: torch.Tensor, rows: int, cols: int, sparsity: float, scope: str
) -> None:
    keep = select(score.abs(), MaskPattern("block", (rows, cols)), sparsity, scope)
    n, k = score.shape
    kept_blocks = []
    for top in range(0, n, rows):
        line = [keep[top : top + rows, left : left + cols] for left in range(0, k, cols)]
        assert all(bool(block.all()) or not bool(block.any()) for block in line)
        kept_blocks.append(sum(bool(block.all()) for block in line))
    wide = math.ceil(k / cols)
    if scope == "row":
        assert kept_blocks == [wide - pruned_of(wide, sparsity)] * len(kept_blocks)
    total = wide * len(kept_blocks)
    assert sum(kept_blocks) == total - pruned_of(total, sparsity) or scope == "row"


@unhurried
@given(scores(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), sparsities, st.sampled_from(["layer", "row"]))
def test_column_blocks_handed_in_one_by_one_make_up_the_quota_of_the_whole(
    score: torch.Tensor, rows: int, cols: int, times: int, sparsity: float, scope: str
) -> None:
    for pattern in (MaskPattern(), MaskPattern("block", (rows, cols))):
        choose, width = Selector(pattern, sparsity, scope), times * pattern.group
        parts = [choose(part, i * width) for i, part in enumerate(torch.split(score.abs(), width, dim=1))]
        high, wide = pattern.params or (1, 1)
        keep, whole = (mask[::high, ::wide] for mask in (torch.cat(parts, 1), choose(score.abs())))
        assert torch.equal(keep.sum(1), whole.sum(1)) if scope == "row" else int(keep.sum()) == int(whole.sum())


def test_blocks_compete_by_their_norm_and_edge_blocks_fairly() -> None:
    score = torch.tensor([[3.0, 0.0, 2.0, 2.0, 2.9]])
    # blocks [3, 0], [2, 2], [2.9]: root mean squares 2.12, 2.00, 2.90; means 1.5, 2.0, 2.9
    assert select(score, MaskPattern("block", (1, 2)), 0.34).tolist() == [[True, True, False, False, True]]
    assert select(score, MaskPattern("block", (1, 2)), 0.34, norm="sum").tolist() == [[False, False, True, True, True]]


def test_equal_scores_keep_the_lower_index_on_every_path() -> None:
    ones = torch.ones(4, 8)
    front = torch.arange(8) < 4
    assert select(ones, MaskPattern(), 0.5).flatten().tolist() == [True] * 16 + [False] * 16
    assert torch.equal(select(ones, MaskPattern(), 0.5, "row"), front.expand(4, 8))
    assert torch.equal(select(ones, MaskPattern("nm", (4, 8)), 0.5), front.expand(4, 8))
    assert torch.equal(select(torch.ones(2, 64), MaskPattern("nm", (4, 64)), 0.5)[0], torch.arange(64) < 4)
    assert torch.equal(select(ones, MaskPattern("vnm", (2, 2, 8)), 0.5), (torch.arange(8) < 2).expand(4, 8))
    assert select(ones, MaskPattern("block", (4, 2)), 0.5)[0].tolist() == front.tolist()


def test_negative_zero_and_zero_are_equal_scores() -> None:
    score = torch.tensor([[0.0, -0.0, 0.0, -0.0]])
    assert select(score, MaskPattern(), 0.5).tolist() == [[True, True, False, False]]
    assert select(-score, MaskPattern(), 0.5).tolist() == [[True, True, False, False]]


def test_a_transposed_score_is_read_by_place_not_by_memory() -> None:
    score = torch.ones(6, 4).t()
    assert torch.equal(select(score, MaskPattern(), 0.5), torch.arange(24).view(4, 6) < 12)


@unhurried
@given(st.integers(0, 2**32 - 1), sparsities)
def test_scores_of_all_magnitudes_are_cut_exactly(seed: int, sparsity: float) -> None:
    generator = np.random.default_rng(seed)
    exponents = generator.uniform(-44, 38, size=(8, 64))  # denormals included: keys are bits, not histogram bins
    score = torch.tensor(10.0**exponents, dtype=torch.float32)
    keep = select(score, MaskPattern(), sparsity)
    assert int((~keep).sum()) == pruned_of(512, sparsity)
    if bool(keep.any()) and not bool(keep.all()):
        assert float(score[keep].min()) >= float(score[~keep].max())


def test_a_pool_of_fixed_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to pool"):
        select_pool([lambda: torch.ones(2, 4)], MaskPattern("nm", (2, 4)), 0.5)


@pytest.mark.parametrize(
    ("text", "kind", "params", "sparsity", "group"),
    [
        ("unstructured", "unstructured", (), None, 1),
        ("2:4", "nm", (2, 4), 0.5, 4),
        ("1:4", "nm", (1, 4), 0.75, 4),
        ("nm:8:16", "nm", (8, 16), 0.5, 16),
        ("64:2:8", "vnm", (64, 2, 8), 0.75, 8),
        ("block:16x1", "block", (16, 1), None, 1),
    ],
)
def test_patterns_are_read_as_keep_n_of_m(
    text: str, kind: str, params: tuple[int, ...], sparsity: float | None, group: int
) -> None:
    pattern = MaskPattern.parse(text)
    assert (pattern.kind, pattern.params, pattern.sparsity, pattern.group) == (kind, params, sparsity, group)
    assert MaskPattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("4:2", "prunes nothing"),
        ("4:4", "prunes nothing"),
        ("0:4", "zero"),
        ("2:", "not a pattern"),
        ("block:16", "not a pattern"),
        ("block:16x0", "zero"),
        ("block:2:4", "not a pattern"),
        ("2x4", "not a pattern"),
        ("1:2:3:4", "not a pattern"),
        ("32:2:3", "four columns"),
        ("32:5:8", "four columns"),
        ("rows", "not a pattern"),
        (124, "reads 2:4 as 124"),
        (496, "reads 8:16 as 496"),
        (230528, "reads 64:2:8 as 230528"),
        (None, "not a text"),
        (True, "not a text"),
    ],
)
def test_an_impossible_pattern_says_why(text: object, words: str) -> None:
    with pytest.raises(BadPattern, match=words):
        MaskPattern.parse(text)


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_keeps_the_contract(name: str) -> None:
    cls = method_class(name)
    method = cls()
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    assert eval(repr(method), {cls.__name__: cls}) == method
    assert hash(method) == hash(cls())
    known = {"structure": NEEDS, "gate": GATE_NEEDS}.get(cls.role, STATISTICS)
    assert set(cls.needs) <= set(known)
    assert cls.source
    assert cls.cost
    assert (cls.__doc__ or "").splitlines()[0].endswith(".")
    calls = {
        "post": ("refine",),
        "reparam": ("apply",),
        "structure": ("apply",),
        "quantize": ("update",),
        "gate": ("gate",),
    }
    if cls.role == "mask":
        assert cls.scope in SCOPES
        assert cls.norm in ("l2", "sum")
        assert isinstance(method, (Scores, Updates))
    elif cls.role == "allocate":
        assert isinstance(method, (Measures, Learns))
    else:
        assert all(callable(getattr(method, call)) for call in calls[cls.role])


def test_an_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UnknownMethod, match="did you mean 'magnitude'"):
        method_class("magnitud")


def test_magnitude_scores_do_not_touch_the_weight() -> None:
    weight = torch.tensor([[-2.0, 1.0], [0.5, -0.25]])
    before, version = weight.clone(), weight._version
    pruned = prune(method_class("magnitude")(), weight, {}, Selector(MaskPattern(), 0.5))
    assert pruned.values is None
    assert pruned.keep.tolist() == [[True, True], [False, False]]
    assert torch.equal(weight, before)
    assert weight._version == version


@dataclasses.dataclass(frozen=True)
class WandaTranscribed:
    """|W| * sqrt(sum x^2): a method that needs data, as its paper writes it (Sun et al., 2023, eq. 1)."""

    needs: ClassVar[tuple[str, ...]] = ("sum_x2",)
    scope: ClassVar[str] = "row"
    norm: ClassVar[str] = "l2"
    source: ClassVar[str] = "Sun et al., 2023"
    cost: ClassVar[str] = "one forward"

    def score(self, weight: torch.Tensor, stats: Statistics) -> torch.Tensor:
        return weight.abs() * stats["sum_x2"].sqrt()


@dataclasses.dataclass(frozen=True)
class SparseGPTTranscribed:
    """The column loop of SparseGPT (Frantar & Alistarh, 2023, algorithm 1), column by column with no blocking."""

    needs: ClassVar[tuple[str, ...]] = ("xxt",)
    scope: ClassVar[str] = "layer"
    norm: ClassVar[str] = "sum"
    source: ClassVar[str] = "Frantar & Alistarh, 2023"
    cost: ClassVar[str] = "a Cholesky a layer"
    block: int = 64  # the quota holds per block: narrow blocks would spend it on columns that matter little
    damp: float = 0.01

    def update(self, weight: torch.Tensor, stats: Statistics, choose: Choose) -> Pruned:
        values = weight.double().clone()
        h = stats["xxt"].double()
        h = h + self.damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
        u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
        keep = torch.ones_like(weight, dtype=torch.bool)
        for begin in range(0, weight.shape[1], self.block):
            part = slice(begin, begin + self.block)
            keep[:, part] = choose(values[:, part].square() / u.diagonal()[part].square(), begin)
            for j in range(begin, min(begin + self.block, weight.shape[1])):
                error = torch.where(keep[:, j], 0.0, values[:, j]) / u[j, j]
                values[:, j:] -= error[:, None] * u[j, j:]
        return Pruned(keep, values.to(weight.dtype))


def inputs_of(k: int, tokens: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(k, k, generator=generator)
    return torch.randn(tokens, k, generator=generator) @ mixing * torch.linspace(0.1, 3, k)


def output_error(x: torch.Tensor, weight: torch.Tensor, new: torch.Tensor) -> float:
    return float(torch.linalg.norm(x @ (weight - new).t()))


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_methods_with_statistics_and_updates_fit_the_contract(pattern: str) -> None:
    """On one layer: the error of the output falls from magnitude to Wanda to SparseGPT, at the same exact quota."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    x = inputs_of(64)
    stats = {"sum_x2": x.square().sum(0), "xxt": x.t() @ x}
    parsed = MaskPattern.parse(pattern)
    errors = []
    for method in (method_class("magnitude")(), WandaTranscribed(), SparseGPTTranscribed()):
        chosen = prune(method, weight, stats, Selector(parsed, 0.5, method.scope, method.norm))
        values = weight if chosen.values is None else chosen.values
        assert int(chosen.keep.sum()) == weight.numel() // 2
        errors.append(output_error(x, weight, values.masked_fill(~chosen.keep, 0.0)))
    assert errors[0] > errors[1] > errors[2]


def test_a_fixed_mask_is_a_choose_like_any_other() -> None:
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(1))
    x = inputs_of(32)
    stats = {"xxt": x.t() @ x}
    fixed = select(weight.abs(), MaskPattern("nm", (2, 4)), 0.5)

    def keep_fixed(score: torch.Tensor, start: int = 0) -> torch.Tensor:
        return fixed[:, start : start + score.shape[1]]

    repaired = prune(SparseGPTTranscribed(), weight, stats, keep_fixed)
    assert repaired.values is not None
    assert torch.equal(repaired.keep, fixed)
    masked = weight.masked_fill(~fixed, 0.0)
    assert output_error(x, weight, repaired.values.masked_fill(~fixed, 0.0)) < output_error(x, weight, masked)


def test_a_column_block_must_not_start_inside_a_group() -> None:
    choose = Selector(MaskPattern("nm", (2, 4)), 0.5)
    assert choose(torch.ones(2, 8), 4).sum(1).tolist() == [4, 4]
    with pytest.raises(ValueError, match="inside a group"):
        choose(torch.ones(2, 8), 6)


def test_a_method_without_score_or_update_is_a_type_error() -> None:
    broken = dataclasses.make_dataclass("Broken", [])()
    with pytest.raises(TypeError, match="neither score nor update"):
        prune(broken, torch.ones(1, 1), {}, Selector(MaskPattern(), 0.5))
