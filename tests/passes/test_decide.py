"""Decisions: solved crossovers against brute force over M, ties, margins, break-even, measurements, and the words."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import targets
from sparsec.facts import BlockFact, Decision, NMFact, ValueFact, WeightFact
from sparsec.formats import BOOKS, VALUE_BITS, VALUE_BYTES, Format, Pattern, storage_bytes
from sparsec.options import Policy
from sparsec.passes.decide import bucket, decide, dense_decision
from sparsec.passes.decide.candidates import (
    MODEL_MARGIN,
    PANEL_PRICE,
    SWITCH_FORMAT,
    SWITCH_LOOP,
    Way,
    dense_way,
    patterns,
    ways_for,
)
from sparsec.passes.decide.cost import Cost, Line, Piece, dense_cost, turning_points
from sparsec.passes.profile.weights import profile
from sparsec.targets import reference
from sparsec.targets.base import DenseRate, KernelRate, Rates
from sparsec.timing import Ratio

TARGET = targets.resolve("reference")
RATES = reference.rates(1)
LAST_M = 700


def a_fact(n: int = 1024, k: int = 1024, density: float = 0.2, **other: object) -> WeightFact:
    nnz = round(n * k * density)
    return WeightFact("", n, k, "fp32", nnz, 0, k, (0,) * 10, 0, 0, 0, 0, **other)  # type: ignore[arg-type]


def random_points(r: random.Random, ms: tuple[int, ...]) -> tuple[tuple[int, float, float, float], ...]:
    """Costs that rise with M, each term possibly nothing."""
    position, nonzero = (10 ** r.uniform(-12, -9.5) * r.choice((0, 1, 1)) for _ in range(2))
    points = []
    for m in ms:
        points.append((m, 10 * position, position, nonzero))
        position, nonzero = position * r.uniform(1, 8), nonzero * r.uniform(1, 8) + r.choice((0, 1e-12))
    return tuple(points)


def random_rates(seed: int) -> Rates:
    r = random.Random(seed)
    dense = []
    for dtype in ("fp32", "bf16"):
        seconds, points = 10 ** r.uniform(-10.5, -9), []
        for m in (1, 2, 4, 8, 16, 64, 256):
            points.append((m, seconds))
            seconds *= r.uniform(0.95, 3.5)
        dense.append(DenseRate(dtype, tuple(points)))
    kernels = [
        KernelRate(
            p,
            loop,
            d,
            random_points(r, (1, 4, 64) if loop == "dot" else (8, 16, 256)),
            r.choice((0, 1e10)),
            exposed=((1.0, r.choice((0.0, 0.1, 0.6))),),
        )
        for p in ("panel", "bitmap", "index", "nm:2:4", "block:16x1")
        for loop in ("dot", "outer")
        for d in ("fp32", "bf16")
    ]
    return Rates(2, 10 ** r.uniform(9.5, 11), 10 ** r.uniform(-6, -5), tuple(dense), tuple(kernels), 2e-6)


def brute_force(dense: Way, ways: list[Way], least: float) -> list[tuple[str, str]]:
    """What runs at M = 1, 2, 3 ..., by evaluating every cost at every M."""
    chosen, last = [], None
    for m in range(1, LAST_M + 1):
        winner, lowest = dense, (math.inf,)
        for way in sorted(ways, key=lambda w: (w.bytes, w.format, w.kernel)):
            if least and way.cost.at(m) * least * way.margin >= dense.cost.at(m):
                continue
            same = last is None or way == last
            factor = 1.0 if same else SWITCH_LOOP if way.format == last.format else SWITCH_FORMAT
            price = way.cost.at(m) * (PANEL_PRICE if way.format.startswith("panel") else 1.0) * factor
            if price < lowest[0]:
                winner, lowest = way, (price,)
        chosen.append((winner.format, winner.kernel))
        last = winner if winner.ours else last
    return chosen


def choices(decision: Decision) -> list[tuple[str, str]]:
    return [(decision.at(m).format, decision.at(m).kernel) for m in range(1, LAST_M + 1)]


def assert_covers_every_m(decision: Decision) -> None:
    assert decision.ranges[0].m_lo == 1
    assert decision.ranges[-1].m_hi is None
    for before, after in zip(decision.ranges, decision.ranges[1:], strict=False):
        assert before.m_hi is not None
        assert after.m_lo == before.m_hi + 1
        assert (before.format, before.kernel) != (after.format, after.kernel)


facts_to_decide = st.builds(
    a_fact,
    n=st.sampled_from([64, 384, 1000, 4096]),
    k=st.sampled_from([64, 384, 4096, 70000]),
    density=st.sampled_from([0.02, 0.1, 0.3, 0.5, 0.9]),
    nm=st.sampled_from([(), (NMFact(2, 4, 100, 0),), (NMFact(2, 4, 100, 3),)]),
    blocks=st.sampled_from([(), (BlockFact(16, 1, 64 * 4, 40, 0.9),)]),
)


@settings(max_examples=120, deadline=None)
@given(
    fact=facts_to_decide,
    seed=st.integers(0, 2**20),
    dtype=st.sampled_from(["fp32", "bf16"]),
    min_speedup=st.sampled_from([0.0, 1.0, 1.05, 1.5]),
)
def test_solved_ranges_are_the_argmin_at_every_m(fact: WeightFact, seed: int, dtype: str, min_speedup: float) -> None:
    rates = random_rates(seed)
    decision = decide(fact, dtype, TARGET, rates, Policy(min_speedup=min_speedup))
    assert_covers_every_m(decision)
    dense = dense_way(fact, dtype, rates)
    assert dense is not None
    policy = Policy(min_speedup=min_speedup)
    ways = ways_for(fact, dtype, rates, policy)
    assert choices(decision) == (brute_force(dense, ways, min_speedup) if ways else [("dense", "")] * LAST_M)
    for m in range(1, LAST_M, 7):
        ran = decision.at(m)
        if ran.format != "dense" and min_speedup:
            way = next(w for w in ways if (w.format, w.kernel) == (ran.format, ran.kernel))
            assert dense.cost.at(m) > min_speedup * way.margin * way.cost.at(m)


@settings(max_examples=60, deadline=None)
@given(fact=facts_to_decide, seed=st.integers(0, 2**20))
def test_candidate_costs_are_sympy_expressions_that_say_what_the_model_says(fact: WeightFact, seed: int) -> None:
    rates = random_rates(seed)
    decision = decide(fact, "fp32", TARGET, rates, Policy())
    dense = dense_way(fact, "fp32", rates)
    assert dense is not None
    ways = [dense, *ways_for(fact, "fp32", rates, Policy())]
    assert [(c.format, c.kernel) for c in decision.candidates] == [(w.format, w.kernel) for w in ways]
    m = sympy.Symbol("M", positive=True)
    for candidate, way in zip(decision.candidates, ways, strict=True):
        function = sympy.lambdify(m, sympy.sympify(candidate.cost, locals={"M": m}), "math")
        for rows in (1, 2, 3, 16, 17, 500, 10000):
            assert function(rows) == pytest.approx(way.cost.at(rows), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(a=st.floats(-10, 10), b=st.floats(-5, 5), c=st.floats(-10, 10), d=st.floats(-5, 5))
def test_two_lines_meet_where_sympy_solves_them_to_meet(a: float, b: float, c: float, d: float) -> None:
    m = sympy.Symbol("M", real=True)
    met = Line(a, b).meets(Line(c, d))
    if met is None:
        assert b == d
        return
    exact = [sympy.Rational(v) for v in (a, b, c, d)]
    (solved,) = sympy.solve(exact[0] + exact[1] * m - exact[2] - exact[3] * m, m)
    assert met == pytest.approx(float(solved), rel=1e-6, abs=1e-9)


def test_dense_cost_passes_through_every_measured_point_and_goes_on() -> None:
    rate = DenseRate("fp32", ((1, 2e-10), (4, 3e-10), (64, 2e-9)))
    cost = dense_cost(rate, 1000, 1e-6)
    for m, seconds in rate.points:
        assert cost.at(m) == pytest.approx(1e-6 + 1000 * seconds)
    assert cost.at(128) > cost.at(64) > cost.at(30) > cost.at(4)


def test_dense_never_becomes_free_after_two_noisy_points() -> None:
    cost = dense_cost(DenseRate("fp32", ((1, 2e-10), (64, 3e-9), (128, 2.9e-9))), 1000, 0.0)
    assert cost.at(10**6) >= cost.at(64) * 0.9


def test_turning_points_end_where_every_cost_has_crossed() -> None:
    flat = Cost((Piece(1, math.inf, (Line(10.0, 0.0),)),))
    steep = Cost((Piece(1, math.inf, (Line(0.0, 2.0),)),))
    assert turning_points([flat, steep]) == [1, 5, 6]


def test_equal_cost_goes_to_dense() -> None:
    per_weight = 1e-10
    rates = Rates(
        1, 1e30, 0.0, (DenseRate("fp32", ((1, per_weight), (2, 2 * per_weight))),),
        (KernelRate("bitmap", "dot", "fp32", ((1, 0.0, per_weight / (1.05 * MODEL_MARGIN), 0.0),)),),
    )  # fmt: skip
    fact = a_fact(64, 64, 0.5)
    exact_tie = Policy(min_speedup=1.05)
    assert not decide(fact, "fp32", TARGET, rates, exact_tie).ours
    ((_, _, seconds, _),) = rates.kernels[0].points
    faster = dataclasses.replace(rates.kernels[0], points=((1, 0.0, 0.99 * seconds, 0.0),))
    a_bit_faster = dataclasses.replace(rates, kernels=(faster,))
    assert decide(fact, "fp32", TARGET, a_bit_faster, exact_tie).ours


def test_of_ways_that_wait_equally_long_for_memory_the_one_that_computes_less_is_taken() -> None:
    slow, quick = (
        KernelRate("bitmap", loop, "fp32", ((1, 0.0, seconds, 0.0),), 1e9, exposed=((1.0, 0.1),))
        for loop, seconds in (("a", 2e-11), ("b", 1e-12))
    )
    rates = dataclasses.replace(RATES, dense=(DenseRate("fp32", ((1, 1e-8),)),), kernels=(slow, quick), overhead=0.0)
    decision = decide(a_fact(density=0.1), "fp32", TARGET, rates, Policy())
    costs = {c.kernel: c.cost for c in decision.candidates if c.format != "dense"}
    assert len(costs) == 2
    assert decision.at(1).kernel == "b"


def test_min_speedup_zero_takes_the_best_sparse_way_even_where_it_loses() -> None:
    slow = dataclasses.replace(RATES, overhead=1.0)
    decision = decide(a_fact(density=0.9), "fp32", TARGET, slow, Policy(min_speedup=0))
    assert decision.source == "forced"
    assert all(r.format != "dense" for r in decision.ranges)
    assert decision.ranges[0].ours_s > decision.ranges[0].dense_s
    assert not decide(a_fact(density=0.9), "fp32", TARGET, slow, Policy()).ours


def test_min_speedup_zero_leaves_a_weight_without_zeros_dense() -> None:
    decision = decide(a_fact(density=1.0), "fp32", TARGET, RATES, Policy(min_speedup=0))
    assert not decision.ours
    assert decision.reason == "no zeros"


def test_a_model_that_was_not_measured_must_promise_more_than_min_speedup() -> None:
    fact = a_fact(4096, 4096, 0.5)
    base = decide(fact, "fp32", TARGET, RATES, Policy(formats=("bitmap",))).ranges[0]
    gain = base.dense_s / base.ours_s
    assert decide(fact, "fp32", TARGET, RATES, Policy(formats=("bitmap",), min_speedup=0.99 * gain / MODEL_MARGIN)).ours
    refused = decide(fact, "fp32", TARGET, RATES, Policy(formats=("bitmap",), min_speedup=1.01 * gain / MODEL_MARGIN))
    assert refused.at(1).format == "dense"


@pytest.mark.parametrize("exposed", [(), ((0.05, 1.0), (0.2, 0.9), (0.5, 0.3))], ids=["hidden", "by density"])
def test_break_even_is_where_the_decision_flips(exposed: tuple[tuple[float, float], ...]) -> None:
    kernels = tuple(dataclasses.replace(k, exposed=exposed) for k in RATES.kernels)
    rates = dataclasses.replace(RATES, kernels=kernels)
    for n, k, dtype in ((4096, 4096, "fp32"), (4096, 4096, "bf16"), (512, 1024, "fp32")):
        even = decide(a_fact(n, k, 0.99), dtype, TARGET, rates, Policy()).break_even
        assert even is not None
        more = decide(a_fact(n, k, 1 - even - 0.005), dtype, TARGET, rates, Policy())
        less = decide(a_fact(n, k, 1 - even + 0.005), dtype, TARGET, rates, Policy())
        assert more.at(1).format != "dense"
        assert less.at(1).format == "dense"


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 2), (2, 1), (1, 3), (0, 4)])
def test_the_smallest_weights_are_decided_too(n: int, k: int) -> None:
    fact = a_fact(n, k, density=1.0)
    assert decide(fact, "fp32", TARGET, reference.rates(1), Policy(min_speedup=0)).reason


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_break_even_rises_with_overhead_and_with_what_is_asked(seed: int) -> None:
    rates = random_rates(seed)

    def even(factor: float, min_speedup: float) -> float:
        changed = dataclasses.replace(rates, overhead=factor * rates.overhead)
        found = decide(a_fact(density=0.9), "fp32", TARGET, changed, Policy(min_speedup=min_speedup)).break_even
        return 2.0 if found is None else found

    rounding = 1e-9
    assert even(0.5, 1.05) <= even(1, 1.05) + rounding
    assert even(1, 1.05) <= even(3, 1.05) + rounding
    assert even(1, 1.0) <= even(1, 1.2) + rounding
    assert even(1, 1.2) <= even(1, 2.0) + rounding


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_every_decision_has_one_sentence(density: float) -> None:
    for n in (1, 64, 4096):
        for policy in (Policy(), Policy(min_speedup=0), Policy(formats=("nm:2:4",)), Policy(formats=("dense",))):
            decision = decide(a_fact(n, 512, density), "fp32", TARGET, RATES, policy)
            assert decision.reason
            assert "\n" not in decision.reason
            assert_covers_every_m(decision)


def test_reasons_say_what_decides() -> None:
    def reason(fact: WeightFact, rates: Rates = RATES, policy: Policy = Policy(), dtype: str = "fp32") -> str:  # noqa: B008
        return decide(fact, dtype, TARGET, rates, policy).reason

    assert reason(a_fact(density=1.0)) == "no zeros"
    assert reason(a_fact(density=0.9)).startswith("break-even is ")
    assert reason(a_fact(16, 16, 0.5)) == "too small: at 16x16 a call costs more than sparsity saves"
    assert reason(a_fact(4096, 4096, 0.5), policy=Policy(formats=("bitmap",))) == "reads 0.53x the bytes"
    assert "2 inf or NaN weights" in reason(dataclasses.replace(a_fact(density=0.1), nonfinite=2))
    assert "sparsec doctor" in reason(a_fact(density=0.1), dataclasses.replace(RATES, kernels=()))
    assert "nm:2:4" in reason(a_fact(density=0.1), policy=Policy(formats=("nm:2:4",)))
    assert "fp16" in reason(a_fact(density=0.1), dtype="fp16")


def test_non_finite_weights_stay_dense_even_when_sparse_is_forced() -> None:
    w = torch.zeros(64, 64)
    w[0, 0] = math.nan
    assert not decide(profile(w), "fp32", TARGET, RATES, Policy(min_speedup=0)).ours


def test_near_patterns_are_told_with_the_groups_that_break_them() -> None:
    fact = a_fact(density=0.5, nm=(NMFact(2, 4, 67115, 1812),))
    decision = decide(fact, "fp32", TARGET, RATES, Policy())
    assert decision.near == "near 2:4 (97.3 % of groups; 1 812 break it)"
    assert not any(c.format.startswith("nm") for c in decision.candidates)
    exact = dataclasses.replace(fact, nm=(NMFact(2, 4, 67115, 0),))
    assert decide(exact, "fp32", TARGET, RATES, Policy()).near == ""
    almost = dataclasses.replace(fact, nm=(NMFact(2, 4, 10**7, 1),))
    assert "99.9 %" in decide(almost, "fp32", TARGET, RATES, Policy()).near


def with_integer_kernels() -> Rates:
    """Codes of int8 whose kernels are no faster than dense, but for those that round x."""
    codes = [
        KernelRate(pattern, loop, "fp32", ((1, 0.0, each, 0.0),), stored=(0.125, 1.0), values="int8")
        for pattern in ("bitmap", "nm", "panel")
        for loop, each in (("dot", 1.0), ("dot/int8", 1e-12))
    ]
    slow = tuple(dataclasses.replace(k, points=((1, 0.0, 1.0, 0.0),)) for k in RATES.kernels)
    return dataclasses.replace(RATES, kernels=(*slow, *codes))


def test_help_and_break_even_know_what_kernels_that_round_x_would_give() -> None:
    fact = a_fact(4096, 4096, 0.99, values=ValueFact("grid", 0, 8, 0, True))
    policy = Policy(formats=("bitmap", "nm"))
    plain = decide(fact, "fp32", TARGET, with_integer_kernels(), policy)
    rounded = decide(fact, "fp32", TARGET, with_integer_kernels(), policy, x="int8")
    assert (plain.help, plain.break_even) == ("", None)
    full = dataclasses.replace(fact, nnz=4096 * 4096)
    assert "2:4 would give" in decide(full, "fp32", TARGET, with_integer_kernels(), policy, x="int8").help
    assert rounded.break_even is not None
    assert rounded.ranges[0].kernel == "dot/int8"


def test_help_names_a_mask_that_would_gain() -> None:
    assert "would give" in decide(a_fact(4096, 4096, 1.0), "fp32", TARGET, RATES, Policy()).help
    assert "2:4" in decide(a_fact(4096, 4096, 0.9), "bf16", TARGET, RATES, Policy()).help
    assert decide(a_fact(16, 16, 1.0), "fp32", TARGET, RATES, Policy()).help == ""


def with_panels(rates: Rates, factor: float) -> Rates:
    """Panels that take ``factor`` times what dense takes at every M."""
    dense = {d.dtype: d for d in rates.dense}["fp32"]
    (m0, s0), (m1, s1) = dense.points[0], dense.points[-1]
    slope = (s1 - s0) / (m1 - m0)
    panel = KernelRate(
        "panel", "dot", "fp32", tuple((m, 0.0, factor * (s0 + (m - 1) * slope), 0.0) for m in (1, 2)), 1e15
    )
    line = DenseRate("fp32", ((1, s0), (m1, s1)))
    return dataclasses.replace(rates, dense=(line,), dense_overhead=rates.overhead, kernels=(*rates.kernels, panel))


def test_a_pack_that_is_not_smaller_than_the_weight_is_taken_only_when_forced() -> None:
    fast = dataclasses.replace(RATES, bandwidth=1e15, overhead=0.0)
    fact = a_fact(density=0.98)
    decision = decide(fact, "fp32", TARGET, fast, Policy())
    assert decision.reason == "only 2 % zero: no format is smaller than the weight itself"
    assert decision.break_even is not None
    assert decision.break_even > 0.03  # one bit for each 32 is what a bitmap adds
    forced = decide(fact, "fp32", TARGET, fast, Policy(min_speedup=0))
    assert {r.format for r in forced.ranges} <= {"bitmap+fp32", "index+fp32"}


def test_panels_run_weights_without_zeros_where_they_are_clearly_faster_than_dense() -> None:
    full = a_fact(4096, 4096, 1.0)
    decision = decide(full, "fp32", TARGET, with_panels(RATES, 0.7), Policy())
    assert decision.at(1).format == "panel+fp32"
    assert decision.reason.startswith("no zeros; stored in panels")
    slow = decide(full, "fp32", TARGET, with_panels(RATES, 0.9), Policy())  # less than its margin allows
    assert slow.at(1).format == "dense"
    assert slow.reason == "no zeros"


def test_a_weight_that_skips_further_on_is_not_said_to_have_too_few_zeros() -> None:
    found = 0
    for seed in range(500):
        decision = decide(a_fact(density=0.2), "fp32", TARGET, random_rates(seed), Policy())
        formats = [r.format for r in decision.ranges if r.format != "dense"]
        sparse = [r for r in decision.ranges if not r.format.startswith(("dense", "panel"))]
        if "panel+fp32" in formats[:1] and sparse:
            found += 1
            assert decision.reason.startswith(f"skips 80 % of the multiplications from {sparse[0].m_lo} rows")
        elif "panel+fp32" in formats:
            assert sparse or decision.reason.startswith("too few zeros to skip; stored in panels")
    assert found > 5


def test_zeros_that_rounding_made_are_not_worth_a_bit_for_each_code() -> None:
    """Rates that promise more of bitmaps than of panels do not hold where a weight is nearly full."""
    line = DenseRate("fp32", ((1, 1e-9),))
    kernels = tuple(
        KernelRate(pattern, "dot/int8", "fp32", ((1, 0.0, seconds, 0.0),), 1e15, stored, values="int8")
        for pattern, seconds, stored in (("panel", 2e-10, (0.0, 1.0)), ("bitmap", 1e-10, (0.125, 1.0)))
    )
    rates = dataclasses.replace(RATES, dense=(line,), overhead=0.0, kernels=kernels)
    values = ValueFact("grid", bits=8, exact=True)
    for density, best in ((0.99, "panel+int8"), (0.88, "panel+int8"), (0.87, "bitmap+int8"), (0.5, "bitmap+int8")):
        fact = a_fact(density=density, values=values)
        assert [w.format for w in ways_for(fact, "fp32", rates, Policy(), x="int8")][-1] == best
        assert decide(fact, "fp32", TARGET, rates, Policy(), x="int8").at(1).format == best
    only = ways_for(a_fact(density=0.99, values=values), "fp32", rates, Policy(formats=("bitmap",)), x="int8")
    assert [w.format for w in only] == ["bitmap+int8"]


def test_panels_are_no_sparse_way() -> None:
    rates = with_panels(RATES, 0.1)
    forced = decide(a_fact(density=0.5), "fp32", TARGET, rates, Policy(min_speedup=0))
    assert not any(r.format.startswith("panel") for r in forced.ranges)
    asked = decide(a_fact(density=0.5), "fp32", TARGET, rates, Policy(min_speedup=0, formats=("panel",)))
    assert {r.format for r in asked.ranges} == {"panel+fp32"}


def test_only_patterns_that_hold_become_candidates() -> None:
    nm = (NMFact(2, 4, 100, 0), NMFact(4, 8, 50, 0), NMFact(1, 4, 100, 2), NMFact(7, 8, 50, 0))
    fact = a_fact(density=0.5, nm=nm, blocks=(BlockFact(16, 1, 100, 50, 1.0), BlockFact(4, 4, 100, 99, 0.5)))
    assert [str(p) for p in patterns(fact)] == ["panel", "bitmap", "index", "nm:2:4", "block:16x1"]
    assert [str(p) for p in patterns(a_fact(density=1.0))] == ["panel"]


@pytest.mark.parametrize(
    ("formats", "kinds"),
    [
        (("bitmap",), {"bitmap"}),
        (("nm",), {"nm"}),
        (("nm:2:4",), {"nm"}),
        (("nm:4:8",), set()),
        (("block", "index"), {"block", "index"}),
        (("dense",), set()),
        ((), {"bitmap", "index", "nm", "block"}),
    ],
)
def test_the_policy_limits_the_formats(formats: tuple[str, ...], kinds: set[str]) -> None:
    fact = a_fact(density=0.5, nm=(NMFact(2, 4, 100, 0),), blocks=(BlockFact(16, 1, 100, 50, 1.0),))
    decision = decide(fact, "fp32", TARGET, RATES, Policy(formats=formats))
    assert {c.format.partition(":")[0].partition("+")[0] for c in decision.candidates} == kinds | {"dense"}


def test_buckets_are_the_next_power_of_two() -> None:
    assert [bucket(m) for m in (1, 2, 3, 4, 5, 8, 9, 128, 129)] == [1, 2, 4, 4, 8, 8, 16, 128, 256]


def ratio(value: float) -> Ratio:
    return Ratio(value, 0.95 * value, 1.05 * value)


def test_measurements_overrule_the_model_in_their_buckets() -> None:
    fact = a_fact(4096, 4096, 0.2)
    model = decide(fact, "fp32", TARGET, RATES, Policy())
    assert model.at(1).format == "index+fp32"
    measured = {
        ("bitmap+fp32", "dot", 1): ratio(2.5),
        ("index+fp32", "dot", 1): ratio(1.9),
        ("bitmap+fp32", "dot", 8): ratio(1.02),
        ("index+fp32", "outer", 8): ratio(1.04),
    }
    decision = decide(fact, "fp32", TARGET, RATES, Policy(), measured)
    assert decision.source == "measured"
    assert_covers_every_m(decision)
    assert (decision.at(1).format, decision.at(1).kernel) == ("bitmap+fp32", "dot")
    assert decision.at(1).dense_s / decision.at(1).ours_s == pytest.approx(2.5)
    assert [decision.at(m).format for m in (5, 8)] == ["dense", "dense"]
    assert [decision.at(m).format for m in (2, 4)] == [model.at(m).format for m in (2, 4)]
    assert {decision.at(m).format for m in (9, 64, 10**6)} == {"dense"}
    assert decision.reason == "reads 0.23x the bytes; measured 2.50x at M=1"


def test_a_second_format_must_be_clearly_faster_than_the_one_in_use() -> None:
    measured = {
        ("index+fp32", "dot", 1): ratio(2.5),
        ("bitmap+fp32", "dot", 1): ratio(2.4),
        ("index+fp32", "outer", 2): ratio(2.0),
        ("bitmap+fp32", "dot", 2): ratio(2.05),
        ("index+fp32", "outer", 4): ratio(2.0),
        ("bitmap+fp32", "dot", 4): ratio(2.4),
    }
    decision = decide(a_fact(density=0.2), "fp32", TARGET, RATES, Policy(), measured)
    assert [decision.at(m).format for m in (1, 2, 4)] == ["index+fp32", "index+fp32", "bitmap+fp32"]


def test_a_gain_inside_the_noise_is_no_gain() -> None:
    measured = {("index+fp32", "dot", 1): Ratio(1.3, 1.04, 1.5)}
    decision = decide(a_fact(density=0.2), "fp32", TARGET, RATES, Policy(), measured)
    assert decision.at(1).format == "dense"
    assert decision.reason == "no clear gain: index measured 1.30x at M=1"
    assert decide(a_fact(density=0.2), "fp32", TARGET, RATES, Policy(min_speedup=1.0), measured).at(1).format != "dense"


def test_measurements_of_other_formats_and_empty_ones_change_nothing() -> None:
    fact = a_fact(density=0.2)
    model = decide(fact, "fp32", TARGET, RATES, Policy(formats=("index",)))
    assert decide(fact, "fp32", TARGET, RATES, Policy(formats=("index",)), {}) == model
    other = decide(fact, "fp32", TARGET, RATES, Policy(formats=("index",)), {("bitmap+fp32", "dot", 1): ratio(9.0)})
    assert other.at(1).format == "dense"


def test_min_speedup_zero_takes_the_fastest_measured_sparse_way() -> None:
    measured = {("bitmap+fp32", "dot", 1): ratio(0.4), ("index+fp32", "dot", 1): ratio(0.6)}
    decision = decide(a_fact(density=0.2), "fp32", TARGET, RATES, Policy(min_speedup=0), measured)
    assert decision.at(1).format == "index+fp32"


def test_a_fallback_is_dense_for_every_m_and_says_why() -> None:
    decision = dense_decision("the kernel could not be built")
    assert (decision.source, decision.reason, decision.ours) == ("fallback", "the kernel could not be built", False)
    assert_covers_every_m(decision)


def mask_of(pattern: Pattern, n: int, k: int, density: float) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    if pattern.kind == "nm":
        keep, of = pattern.params
        scores = torch.rand(n, k // of, of, generator=g)
        return torch.zeros_like(scores).scatter_(2, scores.topk(keep, dim=2).indices, 1.0).reshape(n, k)
    rows, cols = pattern.params or (1, 1)
    density = 1.0 if pattern.kind == "panel" else density
    coarse = torch.rand(n // rows, k // cols, generator=g) < density
    return coarse.repeat_interleave(rows, 0).repeat_interleave(cols, 1).float()


@pytest.mark.parametrize("density", [0.03, 0.2, 0.5])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_storage_bytes_agree_with_what_is_packed(dtype: str, density: float) -> None:
    from sparsec.codegen import cpp

    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    nms = ("nm:2:4", "nm:8:16", "nm:1:4", "nm:1:8")
    blocks = ("block:16x1", "block:4x1", "block:4x4", "block:16x16", "block:32x32", "block:1x16")
    for name in ("panel", "bitmap", "index", *nms, *blocks):
        wanted = Format(Pattern.parse(name), dtype)
        weight = torch.rand(256, 1024, generator=torch.Generator().manual_seed(1)) + 0.5
        weight = (weight * mask_of(wanted.pattern, 256, 1024, density)).to(torch_dtype)
        packed = cpp.pack_verified(weight, wanted, "test")
        assert storage_bytes(wanted, profile(weight)) == pytest.approx(packed.bytes, rel=0.1), name
    assert VALUE_BYTES[dtype] == torch_dtype.itemsize


@pytest.mark.parametrize("values", ["int8", "int8g32", "int4", "int4g64", "int4g128", "ternary", *BOOKS])
def test_storage_bytes_of_codes_agree_with_what_is_packed(values: str) -> None:
    from sparsec.codegen import cpp
    from sparsec.codegen.cpp.values import refusal

    sliced = ("index", "block:16x1", "block:4x4")
    for name in ("panel", "bitmap", "nm:2:4", "nm:1:8", "block:1x16", *sliced):
        if name in sliced and refusal("sliced", values):
            continue
        wanted = Format(Pattern.parse(name), values)
        most = {"tern": 2, "int8": 128, "int4": 8}.get(values[:4], BOOKS.get(values, 0))
        levels = torch.randint(1, most, (128, 1024), generator=torch.Generator().manual_seed(1)).float()
        levels[:, ::8] = most - 1  # so that each group tells its scale
        weight = levels * mask_of(wanted.pattern, 128, 1024, 0.3)
        packed = cpp.pack_verified(weight, wanted, "test")
        assert storage_bytes(wanted, profile(weight)) == pytest.approx(packed.bytes, rel=0.1), name


def test_storage_bytes_count_outliers_and_know_every_value_type() -> None:
    fact = a_fact(64, 256, 0.5)
    plain = storage_bytes(Format.parse("bitmap+int8"), fact)
    assert storage_bytes(Format.parse("bitmap+int8"), fact, outliers=100) == plain + 100 * 6
    wide = dataclasses.replace(fact, k=2**16 + 1, dtype="bf16")
    more = storage_bytes(Format.parse("bitmap+int8"), wide, 10) - storage_bytes(Format.parse("bitmap+int8"), wide)
    assert more == 10 * 6
    for values in VALUE_BITS:
        for pattern in ("dense", "panel", "bitmap", "index", "nm:2:4", "vnm:64:2:8", "block:16x1"):
            known = dataclasses.replace(fact, blocks=(BlockFact(16, 1, 1024, 512, 1.0),))
            assert storage_bytes(Format.parse(f"{pattern}+{values}"), known) > 0
