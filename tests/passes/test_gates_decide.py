"""Where activation sparsity pays: the share that may be left is solved from costs, and nothing is claimed beyond it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import targets
from sparsec.facts import Range, ValueFact, WeightFact
from sparsec.options import Policy
from sparsec.passes.decide import decide
from sparsec.passes.decide.gates import MARGIN, gated
from sparsec.passes.decide.words import gates
from sparsec.targets.base import DenseRate, KernelRate, Rates
from sparsec.timing import Ratio

CPU = targets.resolve("cpu:portable")


def fact(n: int = 4096, k: int = 11008, density: float = 1.0, nonfinite: int = 0) -> WeightFact:
    nnz = round(n * k * density)
    return WeightFact(
        key="", n=n, k=k, dtype="fp32", nnz=nnz, row_nnz_min=nnz // n, row_nnz_max=nnz // n, row_hist=(0,) * 10,
        zero_rows=0, zero_cols=0, negative_zeros=0, nonfinite=nonfinite, values=ValueFact(),
    )  # fmt: skip


def rates(bandwidth: float = 1e10, arithmetic: float = 2e-11, patterns: tuple[str, ...] = ("panel",)) -> Rates:
    points = tuple((m, 1e-11, 0.0, arithmetic * m) for m in (1, 2, 4, 8))
    kernels = [KernelRate(p, loop, "fp32", points, bandwidth) for p in patterns for loop in ("skip", "select")]
    dense = DenseRate("fp32", tuple((m, 4e-10 + 2e-11 * m) for m in (1, 2, 4, 8, 64)))
    return Rates(1, 1e10, 2e-6, (dense,), tuple(kernels), 2e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.floats(1e9, 1e11),
    st.floats(1e-12, 1e-9),
    st.floats(1e-5, 1e-1),
    st.sampled_from([(4096, 11008), (64, 128), (11008, 4096)]),
)
def test_at_the_largest_share_both_ways_cost_the_same(
    bandwidth: float, arithmetic: float, other: float, shape: tuple[int, int]
) -> None:
    known, weight = rates(bandwidth, arithmetic), fact(*shape)
    for r in gated(weight, "fp32", known, Policy(), "skip", 0.0, lambda m: other):
        assert 0 < r.below <= 1
        size = shape[0] * shape[1]
        memory = 4 * size * r.below / bandwidth
        work = 1e-11 * shape[1] + arithmetic * (r.m_hi or 1) * size * r.below
        seconds = known.overhead + max(memory, work)
        assert seconds <= other / MARGIN * (1 + 1e-9)
        if r.below < 1:
            assert seconds == pytest.approx(other / MARGIN)


def test_more_rows_of_x_never_allow_a_larger_share() -> None:
    found = gated(fact(), "fp32", rates(), Policy(), "skip", None, lambda m: 0.02)
    assert [(r.m_lo, r.m_hi) for r in found] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    shares = [r.below for r in found]
    assert shares == sorted(shares, reverse=True)


def test_few_zeros_as_calibrated_keep_the_second_pack_away() -> None:
    assert not gated(fact(), "fp32", rates(), Policy(), "skip", 0.99, lambda m: 0.018)
    assert gated(fact(), "fp32", rates(), Policy(), "skip", 0.2, lambda m: 0.018)


def test_without_a_kernel_or_with_a_weight_that_is_not_finite_nothing_is_skipped() -> None:
    assert not gated(fact(), "fp32", rates(patterns=()), Policy(), "skip", 0.1, lambda m: 1.0)
    decision = decide(fact(nonfinite=1), "fp32", CPU, rates(), Policy(), gates=(("skip", 0.1),))
    assert not decision.gated


def test_formats_that_the_policy_leaves_out_are_not_packed() -> None:
    known = rates(patterns=("panel", "bitmap"))
    found = gated(fact(density=0.5), "fp32", known, Policy(formats=("bitmap",)), "skip", 0.1, lambda m: 1.0)
    assert {r.format for r in found} == {"bitmap+fp32"}


def test_the_decision_for_calls_without_zeros_stays_what_it_was() -> None:
    plain = decide(fact(), "fp32", CPU, rates(), Policy())
    with_gates = decide(fact(), "fp32", CPU, rates(), Policy(), gates=(("skip", None), ("select", 0.3)))
    assert with_gates.ranges == plain.ranges
    assert with_gates.reason == plain.reason
    assert {r.kernel for r in with_gates.gated} == {"skip", "select"}
    assert with_gates.ours


def test_the_sentence_says_from_which_share_of_zeros_on() -> None:
    some = Range(1, 1, "panel+fp32", "skip", 1.0, 0.5, below=0.6)
    assert gates((some,)) == ["where x is zero, columns are skipped, in calls that leave out at least 40 %"]
    assert gates(()) == []


def measured(ratio: float, at: int = 1, loop: str = "skip") -> dict[tuple[str, str, int], Ratio]:
    return {("panel+fp32", loop, at): Ratio(ratio, ratio, ratio)}


def test_a_kernel_that_is_slower_than_its_model_is_asked_for_less() -> None:
    known, weight, said = rates(), fact(), Policy()
    plain = decide(weight, "fp32", CPU, known, said, gates=(("skip", 0.2),)).gated[0]
    expected = plain.dense_s / plain.ours_s
    slower = decide(weight, "fp32", CPU, known, said, measured(expected / 2), gates=(("skip", 0.2),)).gated[0]
    faster = decide(weight, "fp32", CPU, known, said, measured(expected * 2), gates=(("skip", 0.2),)).gated[0]
    assert slower.below == pytest.approx(plain.below * MARGIN / said.min_speedup / 2, rel=0.01)
    assert faster.below > plain.below
    assert slower.ours_s == pytest.approx(2 * plain.ours_s)


def test_what_was_measured_at_one_number_of_rows_says_something_of_others_and_of_no_other_loop() -> None:
    said = (("skip", 0.2), ("select", 0.2))
    plain = decide(fact(), "fp32", CPU, rates(), Policy(), gates=said).gated
    found = decide(fact(), "fp32", CPU, rates(), Policy(), measured(0.5, at=2), gates=said).gated
    assert not [r for r in found if r.kernel == "skip"]  # slower than dense at 2, so nowhere
    assert [r for r in found if r.kernel == "select"] == [r for r in plain if r.kernel == "select"]


def test_measurements_of_parts_do_not_decide_how_calls_without_zeros_run() -> None:
    plain = decide(fact(), "fp32", CPU, rates(), Policy())
    found = decide(fact(), "fp32", CPU, rates(), Policy(), measured(3.0), gates=(("skip", 0.2),))
    assert (found.ranges, found.source, found.reason) == (plain.ranges, plain.source, plain.reason)
