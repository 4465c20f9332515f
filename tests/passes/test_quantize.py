"""Value methods: RTN against a transcription with loops, zeros that stay zeros, and what a recipe makes of it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import sparsec
from sparsec.errors import BadRecipe
from sparsec.passes.masks import method_class
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector
from sparsec.passes.quantize.contract import Grid
from sparsec.passes.quantize.rtn import RTN

ALL = Selector(MaskPattern(), 0.0)


def slowly(row: list[float], bits: int, group: int, symmetric: bool) -> list[float]:
    """One row, number by number, in double precision."""
    made: list[float] = []
    size = group or len(row)
    for start in range(0, len(row), size):
        part = row[start : start + size]
        top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
        width = max(abs(x) for x in part) if symmetric else max(*part, 0.0) - min(*part, 0.0)
        scale = width / top or 1.0
        zero = 0 if symmetric else round(-min(*part, 0.0) / scale)
        low = -top if symmetric else 0
        made += [(min(max(round(x / scale) + zero, low), top) - zero) * scale for x in part]
    return made


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([0, 2, 8, 32]),
    symmetric=st.booleans(),
    k=st.integers(2, 70),
    seed=st.integers(0, 2**16),
)
def test_rtn_is_its_formula_number_by_number(bits: int, group: int, symmetric: bool, k: int, seed: int) -> None:
    if group and k % group == 1:
        k += 1  # the transcription unpacks at least two numbers
    torch.manual_seed(seed)
    weight = torch.randn(3, k) * (torch.rand(3, k) < 0.7)
    found = RTN(bits, group, symmetric).update(weight, {}, ALL)
    assert found.values is not None
    said = torch.tensor([slowly(row, bits, group, symmetric) for row in weight.double().tolist()])
    step = weight.abs().amax() * 2.0 / (2 ** (bits - 1) - 1)
    off = (found.values - said).abs()
    # A number half way between two steps may go either way when the scale is rounded to fp32: very few do.
    assert off.le(1e-5).float().mean() > 0.97
    assert float(off.max()) <= float(step) * 1.001
    assert torch.equal(found.keep, found.values != 0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_pruned_weights_stay_zero_and_rows_of_zeros_stay_finite(symmetric: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 48) + 3.0  # all of one sign: a grid that starts at its minimum would lose the zero
    weight[:, ::2] = 0.0
    weight[3] = 0.0
    values = RTN(4, 16, symmetric).update(weight, {}, ALL).values
    assert values is not None
    assert bool(values.isfinite().all())
    assert not bool(values[weight == 0].count_nonzero())


@pytest.mark.parametrize("symmetric", [True, False])
def test_values_lie_on_a_grid_of_whole_numbers_and_rounding_again_changes_nothing(symmetric: bool) -> None:
    torch.manual_seed(1)
    weight = torch.randn(8, 96)
    grid = Grid(4, 32, symmetric)
    q, scale, zero = grid.parts(weight)
    assert torch.equal(q, q.round())
    assert torch.equal(zero, zero.round())
    assert int(q.min()) >= (-7 if symmetric else 0)
    assert int(q.max()) <= (7 if symmetric else 15)
    once = grid.nearest(weight)
    assert float((grid.nearest(once) - once).abs().max()) <= 1e-6
    assert float((once - weight).abs().max()) <= float(scale.max()) * (0.5 if symmetric else 1.0) * 1.001


def test_fewer_bits_and_wider_groups_cost_more() -> None:
    torch.manual_seed(2)
    weight = torch.randn(64, 256)
    lost = {
        (bits, group): float((Grid(bits, group).nearest(weight) - weight).norm())
        for bits, group in ((8, 0), (4, 32), (4, 0), (3, 0))
    }
    assert list(lost.values()) == sorted(lost.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sparsify_prunes_then_rounds_and_says_both(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16)).to(dtype)
    first = copy.deepcopy(model)
    masks = sparsec.sparsify(first, {"method": "magnitude", "sparsity": 0.5}, progress=False)
    report = sparsec.sparsify(model, ["magnitude", {"method": "rtn", "bits": 4, "group": 16}], progress=False)
    assert [(row.name, row.method) for row in report.layers] == [
        (name, method) for method in ("magnitude", "rtn") for name in ("0", "2")
    ]
    assert report.achieved >= masks.achieved
    for ours, pruned in zip(model.parameters(), first.parameters(), strict=True):
        if ours.ndim == 2:
            assert not bool(ours[pruned == 0].count_nonzero())
            expected = Grid(4, 16).nearest(pruned.detach()).to(dtype)
            assert torch.equal(ours.detach(), expected)
        else:
            assert torch.equal(ours, pruned)


def test_targets_ignore_and_overrides_of_a_value_step_are_those_of_a_mask_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 8))
    before = copy.deepcopy(model.state_dict())
    recipe = {"method": "rtn", "ignore": ["2"], "overrides": {"3": {"bits": 2}}}
    report = sparsec.sparsify(model, recipe, progress=False)
    assert [row.name for row in report.layers] == ["0", "3"]
    assert torch.equal(model[2].weight, before["2.weight"])
    assert len(model[3].weight[0].abs().unique()) <= 2  # a scale, or zero
    with pytest.raises(BadRecipe, match="bits"):
        sparsec.sparsify(model, {"method": "rtn", "bits": 9}, progress=False)
    with pytest.raises(sparsec.errors.UnknownRecipeKey, match="pattern"):
        sparsec.sparsify(model, {"method": "rtn", "pattern": "2:4"}, progress=False)


def test_rtn_says_what_it_needs() -> None:
    cls = method_class("rtn")
    assert cls.role == "quantize"
    assert cls.needs == ()
