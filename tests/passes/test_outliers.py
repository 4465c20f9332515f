"""Outliers aside: what a recipe may say, and the union of what is set aside with the pattern's choice of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.errors import BadOutliers
from sparsec.passes.masks.contract import prune
from sparsec.passes.masks.magnitude import Magnitude
from sparsec.passes.masks.outliers import Outliers, WithOutliers, with_outliers
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector, select_pool

unhurried = settings(deadline=None)


def scores(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, k, generator=torch.Generator().manual_seed(seed))


def chooser(pattern: str, outliers: object, sparsity: float = 0.5, scope: str = "layer") -> WithOutliers:
    found = with_outliers(Selector(MaskPattern.parse(pattern), sparsity, scope), Outliers.parse(outliers))
    assert isinstance(found, WithOutliers)
    return found


def best_of(values: list[float], count: int) -> set[int]:
    return set(sorted(range(len(values)), key=lambda i: (-values[i], i))[:count])


def reference_nm(score: torch.Tensor, n: int, m: int, count: int, width: int) -> torch.Tensor:
    """Row by row: the best ``count`` of each ``width``, then N of M among the others; K a multiple of both."""
    keep = torch.zeros(score.shape, dtype=torch.bool)
    for i, row in enumerate(score.tolist()):
        aside = {g + j for g in range(0, len(row), width) for j in best_of(row[g : g + width], count)}
        left = [-math.inf if j in aside else value for j, value in enumerate(row)]
        chosen = {g + j for g in range(0, len(row), m) for j in best_of(left[g : g + m], n)}
        keep[i, sorted(aside | chosen)] = True
    return keep


@pytest.mark.parametrize(("n", "m", "count"), [(2, 4, 16), (8, 16, 4), (1, 4, 8), (3, 32, 16)])
def test_the_mask_is_the_outliers_and_n_of_m_of_the_rest(n: int, m: int, count: int) -> None:
    score = scores(6, 512)
    keep = chooser(f"{n}:{m}", f"{count}:256")(score)
    assert torch.equal(keep, reference_nm(score, n, m, count, 256))


@pytest.mark.parametrize("count", [4, 8, 16])
def test_outliers_come_on_top_of_the_quota_in_every_row(count: int) -> None:
    keep = chooser("8:16", f"{count}:256")(scores(10, 1024))
    assert set(keep.sum(1).tolist()) == {1024 // 2 + 4 * count}


def test_what_is_set_aside_holds_the_best_scores_and_the_rest_is_legal() -> None:
    score = scores(8, 512)
    choose = chooser("2:4", "16:256")
    keep, aside = choose(score), choose.outliers.aside(score)
    assert bool((keep | ~aside).all())
    rest = keep & ~aside
    assert int(rest.view(-1, 4).sum(1).max()) == 2
    groups = score.view(-1, 256)
    least_aside = groups.masked_fill(~aside.view(-1, 256), math.inf).amin(1)
    assert bool((least_aside >= groups.masked_fill(aside.view(-1, 256), -math.inf).amax(1)).all())


@unhurried
@given(st.integers(1, 700), st.integers(1, 40), st.integers(2, 300), st.integers(0, 2**20))
def test_a_last_group_that_is_not_whole_keeps_its_share(k: int, count: int, width: int, seed: int) -> None:
    if count >= width:
        return
    aside = Outliers(count, width).aside(scores(3, k, seed))
    whole, left = divmod(k, width)
    rest = math.floor(count * left / width + 0.5)
    assert set(aside.sum(1).tolist()) == {whole * count + rest}
    assert rest <= count


@unhurried
@given(st.integers(1, 6), st.sampled_from([4, 16, 48, 100]), st.integers(1, 20))
def test_column_blocks_add_up_to_whole_groups(blocks: int, step: int, count: int) -> None:
    spec, k = Outliers(count, 64), blocks * 64
    score = scores(2, k)
    parts = [spec.aside(score[:, start : start + step], start) for start in range(0, k, step)]
    kept = torch.cat(parts, 1).view(2, -1, 64).sum(2)
    assert kept.tolist() == [[count] * blocks] * 2


def test_a_share_of_the_layer_is_set_aside_whatever_the_rows() -> None:
    score = scores(32, 100)
    score[0] += 10  # one row has all the outliers
    choose = chooser("2:4", 0.02)
    aside = choose.outliers.aside(score)
    assert int(aside.sum()) == 64
    assert int(aside[0].sum()) == 64
    of_group = aside[0].view(-1, 4).sum(1)
    assert choose(score)[0].view(-1, 4).sum(1).tolist() == [min(4, 2 + int(o)) for o in of_group]
    assert torch.equal(choose(score)[1:], Selector(MaskPattern.parse("2:4"), 0.5)(score[1:]))


def test_a_share_asked_for_column_block_by_column_block_is_that_of_the_layer() -> None:
    spec = Outliers(share=0.05)
    parts = [spec.aside(scores(1, 8), start) for start in range(0, 800, 8)]
    assert int(torch.cat(parts, 1).sum()) == 40


def test_an_unstructured_quota_counts_what_is_left() -> None:
    score = scores(16, 512)
    assert int(chooser("unstructured", "16:256", 0.7)(score).sum()) == round(16 * 512 * 0.3) + 16 * 32
    rows = chooser("unstructured", "16:256", 0.7, "row")(score).sum(1)
    assert set(rows.tolist()) == {512 - round(512 * 0.7) + 32}


def test_a_pool_of_layers_keeps_its_outliers_on_top() -> None:
    layers = [scores(8, 256, 1), scores(4, 512, 2) * 3]
    spec = Outliers.parse("8:256")
    assert spec is not None
    pool = select_pool([partial(spec.rest, s) for s in layers], MaskPattern(), 0.5)
    keep = [with_outliers(choose, spec)(s) for choose, s in zip(pool, layers, strict=True)]
    total = 8 * 256 + 4 * 512
    assert sum(int(k.sum()) for k in keep) == total // 2 + 8 * 8 + 4 * 16


def test_any_method_takes_it_and_scores_stay_as_they_are() -> None:
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    keep = prune(Magnitude(), weight, {}, chooser("2:4", "4:256")).keep
    assert torch.equal(weight, before)
    assert keep.sum().item() == 4 * (128 + 4)


def test_dead_scores_and_ties_are_decided_by_position() -> None:
    keep = chooser("2:4", "16:256")(torch.zeros(2, 256))
    assert keep[:, :16].all()
    assert keep[0, 16:].view(-1, 4).tolist() == [[True, True, False, False]] * 60
    assert torch.equal(keep[0], keep[1])


def test_scores_of_half_precision_and_huge_scores_work() -> None:
    score = scores(2, 256)
    for made in (score.bfloat16(), score.double() * 1e30):
        assert int(chooser("2:4", "16:256")(made).sum()) == 2 * (128 + 16)


@dataclass
class Fixed:
    """A mask given beforehand; it has no pattern."""

    mask: torch.Tensor

    def __call__(self, score: torch.Tensor, start: int = 0) -> torch.Tensor:
        return self.mask[:, start : start + score.shape[1]]


def test_a_fixed_mask_grows_by_its_outliers() -> None:
    mask = torch.zeros(3, 256, dtype=torch.bool)
    choose = with_outliers(Fixed(mask), Outliers(4, 256))
    assert choose(scores(3, 256)).sum().item() == 12
    assert choose.pattern == MaskPattern()  # type: ignore[attr-defined]


def test_what_a_recipe_says_is_read_and_written_alike() -> None:
    assert Outliers.parse(None) is None
    assert Outliers.parse("none") is None
    assert Outliers.parse("16:256") == Outliers(16, 256)
    for share in (0.005, "0.005", "5e-3"):
        assert Outliers.parse(share) == Outliers(share=0.005)
    for spec in (Outliers(4, 256), Outliers(share=0.0123)):
        assert Outliers.parse(str(spec)) == spec
    choose = Selector(MaskPattern(), 0.5)
    assert with_outliers(choose, None) is choose


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("0:256", "sets none aside"),
        ("256:256", "sets all aside"),
        (0, "not between 0 and 1"),
        (1.0, "not between 0 and 1"),
        (-0.1, "not between 0 and 1"),
        (math.nan, "neither a share nor k:M"),
        (True, "neither a share nor k:M"),
        ("16/256", "neither a share nor k:M"),
        ([16, 256], "neither a share nor k:M"),
        (272, "put it in quotes"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_sentence(said: object, why: str) -> None:
    with pytest.raises(BadOutliers, match=why) as told:
        Outliers.parse(said)
    assert "k:256" in str(told.value)


@pytest.mark.parametrize("pattern", ["64:2:8", "block:16x1"])
def test_patterns_of_blocks_leave_outliers_no_room(pattern: str) -> None:
    with pytest.raises(BadOutliers, match="leave them room"):
        chooser(pattern, "16:256")
