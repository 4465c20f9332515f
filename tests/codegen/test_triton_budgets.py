"""Instruction budgets of GPU kernels: what the stored counts say, with nothing compiled."""

from __future__ import annotations

import pytest

from sparsec.codegen.triton import census


def test_what_is_over_its_budget_says_why_and_nothing_else_does() -> None:
    assert not [c for c in census.stored() if (c.per_unit > c.budget) != bool(c.reason)]


@pytest.mark.parametrize("m", [1, 4, 16])
def test_each_format_of_fixed_counts_or_codes_has_a_loop_within_budget_for_few_rows(m: int) -> None:
    best: dict[str, float] = {}
    for c in census.stored():
        if c.m == m and c.format.startswith(("dense+", "nm:8:16", "nm:4:8", "nm:2:4", "block:16", "block:64")):
            best[c.format] = min(best.get(c.format, 9.9), c.per_unit / c.budget)
    assert len(best) >= 15
    assert {name: share for name, share in best.items() if share > 1} == {}


def test_positions_of_half_dense_bitmaps_fit_their_budget() -> None:
    few = [c for c in census.stored() if c.format.startswith("bitmap") and c.m <= 16]
    assert few
    for c in few:
        assert c.per_unit <= 7.8 * (c.bytes_position + 0.5 * c.bytes_value)
