"""One format for every M: the loop is the cheapest at each, and where dense would win is said."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec.facts import WeightFact
from sparsec.options import Policy
from sparsec.passes.decide.candidates import dense_way
from sparsec.passes.decide.whole import SWITCH, UNPACK, best_whole, formats_for, plan_of, plus
from sparsec.passes.profile.weights import profile
from sparsec.targets import reference

RATES = reference.rates(1)
FORCED = Policy(target="reference", min_speedup=0)


def fact_of(n: int, k: int, zeros: float) -> WeightFact:
    g = torch.Generator().manual_seed(0)
    return profile(torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) >= zeros))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    zeros=st.sampled_from([0.5, 0.7, 0.9, 0.98]),
    unpack_s=st.sampled_from([0.0, 1e-6, 1e-4, 1e-2]),
    m=st.integers(1, 5000),
)
def test_the_route_is_the_cheapest_loop_and_dense_from_is_exact(zeros: float, unpack_s: float, m: int) -> None:
    fact = fact_of(256, 320, zeros)
    dense = dense_way(fact, "fp32", RATES)
    assert dense is not None
    for name, ways in formats_for(fact, "fp32", RATES, FORCED).items():
        plan = plan_of(name, ways, dense, unpack_s)
        costs = {way.kernel: way.cost for way in ways} | {UNPACK: plus(dense.cost, unpack_s)}
        loop = [loop for start, loop in plan.routes if start <= m][-1]
        ours = costs[loop].at(m)
        assert ours <= SWITCH * min(c.at(m) for c in costs.values()) * (1 + 1e-9)
        ratio = ours / dense.cost.at(m)
        assert ratio <= max(plan.worst, 1.0) * (1 + 1e-6)
        if plan.dense_from is None or m < plan.dense_from:
            assert ratio <= 1 + 1e-9


def test_decoding_that_costs_nothing_bounds_the_loss_and_free_of_it_there_may_be_one() -> None:
    fact = fact_of(256, 320, 0.5)
    dense = dense_way(fact, "fp32", RATES)
    assert dense is not None
    (name, ways), *_ = formats_for(fact, "fp32", RATES, FORCED).items()
    free = plan_of(name, ways, dense, 0.0)
    assert free.worst <= SWITCH
    assert plan_of(name, ways, dense, 1e6).routes[-1][1] != UNPACK


def test_a_weight_without_zeros_has_no_plan_and_the_sparser_weight_the_better_one() -> None:
    assert best_whole(fact_of(64, 64, 0.0), "fp32", RATES, FORCED) is None
    scores = [p.score for z in (0.5, 0.8, 0.95) if (p := best_whole(fact_of(256, 256, z), "fp32", RATES, FORCED))]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    only = best_whole(fact_of(256, 256, 0.9), "fp32", RATES, Policy(formats=("bitmap",), min_speedup=0))
    assert only is not None
    assert only.format == "bitmap+fp32"
