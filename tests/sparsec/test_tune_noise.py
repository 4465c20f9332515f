"""What a noisy clock may do to a decision: time is simulated, so the noise is known and every test repeats exactly."""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsec import targets, timing
from sparsec.facts import WeightFact
from sparsec.options import Policy
from sparsec.passes.decide.measured import Measured
from sparsec.passes.profile.weights import profile
from sparsec.timing import Ratio, Samples, certain, interleave, speedup
from sparsec.tune import measured_for, tuning
from sparsec.tune_db import Database
from sparsec.tune_point import Timed, Trial
from sparsec.tune_record import Key

TUNE = importlib.import_module("sparsec.tune")
DENSE_S = 1e-3
LEAST = 1.05  # the default of min_speedup

Noise = Callable[["Clock"], float]  # how many times longer a call that starts now takes


class Clock:
    """Stands in for the ``time`` module: calls advance it, and others on the machine make calls longer."""

    def __init__(self, seed: int, noise: Noise) -> None:
        self.now, self.random, self.noise = 0.0, random.Random(seed), noise
        self.until, self.factor = 0.0, 1.0

    def perf_counter(self) -> float:
        return self.now

    def call(self, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.now += seconds * self.noise(self)

        return run


def jitter(clock: Clock) -> float:
    """Every call is up to half as long again, and one in ten is hit by a heavy tail."""
    return 1 + clock.random.random() / 2 + (clock.random.paretovariate(1.1) if clock.random.random() < 0.1 else 0)


def bursts(clock: Clock) -> float:
    """A neighbour takes the cores for 1 to 20 calls on end, about half of the time."""
    if clock.now >= clock.until:
        clock.factor = clock.random.choice([1.0, 1.0, 2.0, 3.0, 8.0])
        clock.until = clock.now + DENSE_S * clock.random.uniform(1, 20)
    return clock.factor * (1 + clock.random.random() / 20)


def drift(clock: Clock) -> float:
    """The frequency falls while it is measured, to half of what it was."""
    return min(2.0, 1 + clock.now / (60 * DENSE_S)) * (1 + clock.random.random() / 10)


def stalls(clock: Clock) -> float:
    """Now and then a thread waits a time slice for its core: a call of a hundred times its length."""
    return 100.0 if clock.random.random() < 0.2 else 1 + clock.random.random() / 10


NOISES: tuple[Noise, ...] = (jitter, bursts, drift, stalls)


def sampled(gain: float, seed: int, noise: Noise, rounds: int = 15) -> tuple[Samples, Samples]:
    """Dense and a kernel that is ``gain`` times faster, interleaved on a noisy machine."""
    clock = Clock(seed, noise)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "time", clock)
        samples = interleave({"dense": clock.call(DENSE_S), "ours": clock.call(DENSE_S / gain)}, rounds)
    return samples["dense"], samples["ours"]


def seems_faster_in_sequence(gain: float, seed: int, noise: Noise) -> bool:
    """The kernel fifteen times, then dense fifteen times, the careless way."""
    clock = Clock(seed, noise)
    ours, dense = clock.call(DENSE_S / gain), clock.call(DENSE_S)
    starts = []
    for call in (ours, dense):
        starts.append(clock.now)
        for _ in range(15):
            call()
    return clock.now - starts[1] > starts[1]


@pytest.mark.parametrize("noise", NOISES)
def test_a_loser_is_picked_in_at_most_one_of_hundreds_of_noisy_runs(noise: Noise) -> None:
    runs = [sampled(0.95, seed, noise) for seed in range(500)]
    picked = sum(certain(dense, ours).low > LEAST for dense, ours in runs)
    by_median = sum(speedup(dense, ours).value > 1 for dense, ours in runs)
    by_mean = sum(sum(dense.seconds) > sum(ours.seconds) for dense, ours in runs)
    in_sequence = sum(seems_faster_in_sequence(0.95, seed, noise) for seed in range(500))
    assert picked <= 1
    assert max(by_median, by_mean, in_sequence) > 20  # the noise is such that careless ways do pick it


@pytest.mark.parametrize("noise", NOISES)
def test_a_kernel_as_fast_as_dense_loses_the_tie(noise: Noise) -> None:
    assert sum(certain(*sampled(1.0, seed, noise)).low > LEAST for seed in range(500)) <= 10


@pytest.mark.parametrize(("noise", "least"), [(jitter, 0.9), (bursts, 0.6), (drift, 0.99), (stalls, 0.5)])
def test_a_clear_gain_is_mostly_seen_through_the_noise(noise: Noise, least: float) -> None:
    assert sum(certain(*sampled(2.0, seed, noise)).low > LEAST for seed in range(500)) >= 500 * least


def test_the_interval_holds_the_truth_in_about_95_of_100_runs() -> None:
    for rounds in (5, 15, 40):
        found = [speedup(*sampled(1.3, seed, jitter, rounds)) for seed in range(400)]
        assert sum(r.low <= 1.3 <= r.high for r in found) >= 0.92 * 400


@given(
    base=st.lists(st.floats(1e-6, 1.0), min_size=5, max_size=40),
    seed=st.integers(0, 2**32),
)
@settings(derandomize=True, max_examples=200)
def test_certainty_never_exceeds_what_rounds_or_quiet_moments_show(base: list[float], seed: int) -> None:
    r = random.Random(seed)
    dense, ours = Samples(tuple(base)), Samples(tuple(x * r.uniform(0.2, 3) for x in base))
    found, paired = certain(dense, ours), speedup(dense, ours)
    assert found.low <= paired.low <= found.value == paired.value <= found.high == paired.high
    assert found.low <= dense.best / ours.best


def test_dense_held_up_in_most_rounds_is_no_gain() -> None:
    """A barrier of dense's threads waits for a busy core, the kernel's queue does not: each of 12 rounds agrees."""
    dense = Samples((1.0, 1.0, 1.0, *[2.0] * 12))
    ours = Samples((1.1,) * 15)
    assert speedup(dense, ours).low > LEAST
    assert certain(dense, ours).low < 1


# -------------------------------------------------------------------------------------------------- the whole tuner


class FakePoint:
    """One way, ``gain`` times faster than dense on the simulated machine; the model promises ``promise``."""

    def __init__(self, clock: Clock, gain: float, promise: float, busy: bool) -> None:
        self.clock, self.gain, self.promise, self.busy, self.asked = clock, gain, promise, busy, 0

    def trials(self, m: int, effort: object) -> dict[Key, Trial]:
        key = Key("cpu/simulated", "2.13", 2, "text", "bitmap+int8", "dot", "fp32", 64, 64, 8, m, True)
        return {key: Trial(None, 1.0, 1.25 * self.promise, 1.25)}

    def measure(self, trials: dict[Key, Trial], m: int, effort: object, budget_s: float) -> Timed:
        self.asked += 1
        calls = {"dense": self.clock.call(DENSE_S), "ours": self.clock.call(DENSE_S / self.gain)}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(timing, "time", self.clock)
            samples = interleave(calls, 15)
        return Timed(samples["dense"], dict.fromkeys(trials, samples["ours"]), self.busy)


def tuned(folder: Path, point: FakePoint, effort: str = "quick", budget_s: float = 60.0) -> Measured:
    weight = torch.eye(64)
    fact: WeightFact = profile(weight)
    with pytest.MonkeyPatch.context() as patch, tuning(budget_s):
        patch.setattr(TUNE, "_point", lambda *_: point)
        policy = Policy(tune=effort, cache_dir=str(folder))
        return measured_for(weight, fact, "fp32", targets.resolve("cpu:portable"), policy, (1,))


def quiet(clock: Clock) -> float:
    return 1.0


def test_on_a_busy_machine_measuring_only_takes_away_from_what_the_model_promises(tmp_path: Path) -> None:
    for i, (gain, promise, low) in enumerate([(3.0, 1.02, 1.02), (3.0, 1.5, 1.5), (1.2, 2.0, 1.2)]):
        folder = tmp_path / str(i)
        (found,) = tuned(folder, FakePoint(Clock(0, quiet), gain, promise, busy=True)).values()
        assert found.low == pytest.approx(low)
        (record,) = Database(folder).all()
        assert record.busy
        assert record.model_dense_s / record.model_s == pytest.approx(1.25 * promise)


def test_what_was_measured_on_a_busy_machine_is_measured_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = FakePoint(Clock(0, quiet), 3.0, 1.0, busy=True)
    for _ in range(3):
        tuned(tmp_path, first)
    assert first.asked == 1
    now = TUNE.time.time()
    monkeypatch.setattr(TUNE.time, "time", lambda: now + TUNE.BUSY_S + 1)
    assert tuned(tmp_path, first, budget_s=0.0)  # without a budget, what is known is used
    later = FakePoint(Clock(0, quiet), 3.0, 1.0, busy=False)
    (found,) = tuned(tmp_path, later).values()
    assert (later.asked, found.low) == (1, pytest.approx(3.0))
    tuned(tmp_path, later)
    assert later.asked == 1


def test_more_effort_measures_again_and_less_does_not(tmp_path: Path) -> None:
    asked = []
    for effort in ("quick", "full", "quick", "full"):
        point = FakePoint(Clock(0, quiet), 3.0, 1.0, busy=False)
        tuned(tmp_path, point, effort)
        asked.append(point.asked)
    assert asked == [1, 1, 0, 0]
    (record,) = Database(tmp_path).all()
    assert record.effort == "full"


def test_what_the_budget_cut_short_is_measured_again_when_there_is_more(tmp_path: Path) -> None:
    point = FakePoint(Clock(0, quiet), 3.0, 1.0, busy=False)
    tuned(tmp_path, point, budget_s=0.1)
    assert Database(tmp_path).all()[0].effort == ""
    tuned(tmp_path, point)
    tuned(tmp_path, point)
    assert point.asked == 2
    assert Database(tmp_path).all()[0].effort == "quick"


def test_a_surer_interval_is_what_decides(tmp_path: Path) -> None:
    (found,) = tuned(tmp_path, FakePoint(Clock(7, stalls), 1.0, 1.0, busy=False)).values()
    assert isinstance(found, Ratio)
    assert found.low <= LEAST
