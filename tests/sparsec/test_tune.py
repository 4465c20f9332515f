"""Rates and tuning: what is kept, what is measured again, what a budget bounds, and who may share it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsec
from sparsec import cli, options, targets
from sparsec.cache import read_json, write_json
from sparsec.codegen.cpp.codes import codes_of
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.efforts import EFFORTS
from sparsec.errors import BadOptionValue, CompileFailed, SparsecWarning, TuningNotKept
from sparsec.formats import Format, Pattern
from sparsec.measure import _kernels, _machines, _no_slower, plausible, rates, rates_for
from sparsec.measure_calls import best_seconds, cold_bytes, thread_count
from sparsec.measure_kernels import (
    FASTEST,
    USUALLY_EXPOSED,
    Cold,
    Text,
    compile_all,
    fit,
    fitted,
    kernel_texts,
    measure_kernel,
    memory_of,
    sample,
)
from sparsec.options import Policy
from sparsec.passes.decide import decide
from sparsec.passes.decide.candidates import ways_for
from sparsec.passes.decide.cost import kernel_cost
from sparsec.passes.profile.weights import profile
from sparsec.passes.quantize.contract import Grid
from sparsec.runtime.direct import Direct
from sparsec.targets import reference
from sparsec.targets.base import DenseRate, KernelRate, Rates
from sparsec.timing import Ratio, Samples
from sparsec.tune import measured_for, tuning
from sparsec.tune_db import Database
from sparsec.tune_record import Key, Record

TUNE, CPU, MEASURE, CALLS = (
    importlib.import_module(f"sparsec.{name}") for name in ("tune", "tune_cpu", "measure", "measure_calls")
)
PORTABLE = targets.resolve("cpu:portable")


def a_weight(n: int = 48, k: int = 64, density: float = 0.1, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=g) * (torch.rand(n, k, generator=g) < density)


class FakeDirect:
    """Stands in for a compiled kernel: the same result by plain torch, and a log of what was asked for."""

    def __init__(self, made: list[str], weight: torch.Tensor, name: str, packed: Packed | None) -> None:
        made.append(name)
        self.weight = weight
        empty = torch.zeros(1, dtype=torch.int64)
        self.packed = packed or Packed(None, 1, (weight.clone(),), empty, tuple(weight.shape), "")  # type: ignore[arg-type]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tuning with kernels that need no compiler and a machine whose rates are written down; gives what was made."""
    made: list[str] = []

    def direct(
        weight: torch.Tensor, spec: Any, target: Any, cache: Path, packed: Packed | None = None, conv: Any = None
    ) -> FakeDirect:
        return FakeDirect(made, weight, f"{spec.format}/{spec.loop}", packed)

    monkeypatch.setattr(CPU, "direct", direct)
    monkeypatch.setattr(CPU, "wait_for_cores", lambda threads: True)
    monkeypatch.setattr(CPU, "others_s", lambda: 0.0)  # on a busy machine records are taken with more care
    monkeypatch.setattr(CPU, "rates_for", lambda *_: dataclasses.replace(reference.rates(1), overhead=0.0))
    return made


@pytest.fixture(autouse=True)
def own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TUNE, "_process", {})


def policy(cache: Path, **other: Any) -> Policy:
    return Policy(**{"tune": "quick", "cache_dir": str(cache), "min_speedup": 0.0, **other})


def measure(weight: torch.Tensor, said: Policy, ms: tuple[int, ...] = (1, 16)) -> dict[tuple[str, str, int], Ratio]:
    return measured_for(weight, profile(weight), "fp32", PORTABLE, said, ms)


# -------------------------------------------------------------------------------------------------- tuning


def test_each_way_is_measured_at_each_power_of_two(tmp_path: Path, kernels: list[str]) -> None:
    found = measure(a_weight(), policy(tmp_path), (1, 9))
    assert {m for _, _, m in found} == {1, 16}
    assert len(found) == 2 * EFFORTS["quick"].candidates
    for ratio in found.values():
        assert 0 < ratio.low <= ratio.value <= ratio.high
    records = Database(tmp_path).all()
    assert {(r.key.format, r.key.loop, r.key.m) for r in records} == set(found)
    assert all(r.dense_s > 0 and r.ours_s > 0 and r.rounds >= 5 for r in records)


def test_what_was_measured_once_is_not_measured_again(tmp_path: Path, kernels: list[str]) -> None:
    with tuning(60.0) as first:
        before = measure(a_weight(), policy(tmp_path))
    made = len(kernels)
    with tuning(60.0) as second:
        after = measure(a_weight(seed=1), policy(tmp_path))  # another weight of the same shape and density
    assert after == before
    assert len(kernels) == made
    assert (len(first.measured), len(first.reused)) == (len(before), 0)
    assert (len(second.measured), len(second.reused)) == (0, len(before))


def test_another_density_or_thread_count_is_measured_for_itself(tmp_path: Path, kernels: list[str]) -> None:
    measure(a_weight(), policy(tmp_path), (1,))
    count = len(Database(tmp_path).all())
    measure(a_weight(density=0.5), policy(tmp_path), (1,))
    assert len(Database(tmp_path).all()) == 2 * count
    with thread_count(torch.get_num_threads() + 1):
        measure(a_weight(), policy(tmp_path), (1,))
    assert len(Database(tmp_path).all()) == 3 * count


def test_budget_zero_measures_nothing_and_the_model_decides(tmp_path: Path, kernels: list[str]) -> None:
    weight = a_weight(512, 512)
    said = policy(tmp_path, tune_budget_s=0.0, min_speedup=1.05)
    with tuning(0.0) as session:
        measured = measure(weight, said)
    assert measured == {}
    assert (session.measured, kernels) == ([], [])
    assert session.skipped > 0
    decision = decide(profile(weight), "fp32", PORTABLE, reference.rates(1), said, measured)
    assert decision.source == "model"
    assert decision.ours


def test_a_budget_is_for_all_weights_of_the_process(tmp_path: Path, kernels: list[str]) -> None:
    said = policy(tmp_path, tune_budget_s=0.004)
    answers = [measure(a_weight(n=16 * (i + 1)), said, (1,)) for i in range(40)]
    assert answers[0]
    assert not answers[-1]
    assert len(Database(tmp_path).all()) == sum(len(a) for a in answers)


def test_known_records_are_used_even_when_the_budget_is_spent(tmp_path: Path, kernels: list[str]) -> None:
    before = measure(a_weight(), policy(tmp_path))
    with tuning(0.0):
        assert measure(a_weight(), policy(tmp_path)) == before


def test_an_interruption_keeps_what_was_measured_so_far(
    tmp_path: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Database.save

    def save_two_then_stop(self: Database, record: Record) -> None:
        if len(self.all()) == 2:
            raise KeyboardInterrupt
        save(self, record)

    monkeypatch.setattr(Database, "save", save_two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        measure(a_weight(), policy(tmp_path))
    monkeypatch.setattr(Database, "save", save)
    with tuning(60.0) as session:
        measure(a_weight(), policy(tmp_path))
    assert len(session.reused) == 2
    assert len(session.measured) == 2 * EFFORTS["quick"].candidates - 2


def test_a_kernel_that_cannot_be_made_is_left_to_the_decision(
    tmp_path: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    working = CPU.direct

    def direct(weight: torch.Tensor, spec: Any, *rest: Any) -> FakeDirect:
        if str(spec.format).startswith("index"):
            raise CompileFailed(compiler="g++", source="x.cpp", detail="broken on purpose")
        made: FakeDirect = working(weight, spec, *rest)
        return made

    monkeypatch.setattr(CPU, "direct", direct)
    found = measure(a_weight(), policy(tmp_path))
    assert {f for f, _, _ in found} == {"bitmap+fp32"}


def test_nothing_is_measured_for_weights_and_targets_that_cannot_run_sparse(tmp_path: Path, kernels: list[str]) -> None:
    broken = a_weight()
    broken[0, 0] = float("nan")
    assert measure(broken, policy(tmp_path)) == {}
    assert measure(a_weight(density=2.0), policy(tmp_path)) == {}
    assert measure(a_weight(), policy(tmp_path, tune="off")) == {}
    made_up = targets.resolve("reference")
    assert measured_for(a_weight(), profile(a_weight()), "fp32", made_up, policy(tmp_path), (1,)) == {}
    assert kernels == []


def test_ways_that_the_model_calls_hopeless_are_not_tried(tmp_path: Path, kernels: list[str]) -> None:
    slow = dataclasses.replace(reference.rates(1), overhead=1.0)
    CPU.rates_for = lambda *_: slow  # undone with the fixture's own patch
    assert measure(a_weight(), policy(tmp_path, min_speedup=1.05)) == {}
    assert measure(a_weight(), policy(tmp_path, min_speedup=0.0)) != {}


def test_large_weights_are_measured_from_copies_that_no_cache_holds(
    tmp_path: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CPU, "cold_bytes", lambda target: 2**20)
    measure(a_weight(), policy(tmp_path), (1,))
    assert not any(r.key.cold for r in Database(tmp_path).all())
    kernels.clear()
    measure(a_weight(256, 256), policy(tmp_path), (1,))
    assert any(r.key.cold for r in Database(tmp_path).all())
    per_format = max(kernels.count(name) for name in kernels)
    assert per_format >= 2**20 // (256 * 256 * 4)  # the fake pack is as large as the weight


def test_two_that_tune_at_the_same_time_measure_each_way_once(tmp_path: Path, kernels: list[str]) -> None:
    weight, said = a_weight(), policy(tmp_path)
    with tuning(60.0) as session, ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: measure(weight, said), range(4)))
    assert all(answer == answers[0] for answer in answers)
    assert len(session.measured) == len(answers[0])
    assert len(session.reused) == 3 * len(answers[0])


def full_disk(*_: object) -> None:
    raise sqlite3.OperationalError("database or disk is full")


def test_where_nothing_can_be_written_a_process_still_measures_once(
    tmp_path: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsec.tune_schema.insert", full_disk)
    with pytest.warns(SparsecWarning, match="disk is full"):
        first = measure(a_weight(), policy(tmp_path))
    made = len(kernels)
    assert measure(a_weight(), policy(tmp_path)) == first
    assert len(kernels) == made


def test_a_tuning_that_cannot_be_kept_ends_at_its_first_record(
    tmp_path: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsec.tune_schema.insert", full_disk)
    with tuning(60.0, strict=True), pytest.raises(TuningNotKept, match=r"disk is full.*make room"):
        measure(a_weight(), policy(tmp_path))


def test_a_record_holds_what_the_model_expected(tmp_path: Path, kernels: list[str]) -> None:
    weight = a_weight()
    measure(weight, policy(tmp_path), (16,))
    ways = ways_for(profile(weight), "fp32", CPU.rates_for(), policy(tmp_path))
    for record in Database(tmp_path).all():
        (way,) = [w for w in ways if f"{w.format}/{w.kernel}" == record.key.name]
        assert record.model_s == way.cost.at(16)
        assert record.model_dense_s > 0


def test_values_may_be_stored_otherwise_than_x_is(
    tmp_path: Path, kernels: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The format of a way, not the dtype of x, names the kernel that is tried."""
    asked: list[tuple[str, str]] = []

    def texts(wanted: Format, dtype: str, target: Any, x: str) -> list[Text]:
        asked.append((str(wanted), dtype))
        return [Text(KernelSpec(wanted, "dot", dtype, "portable"), f"text of {wanted}")]

    base = dataclasses.replace(reference.rates(1), overhead=0.0)
    dots = [k for k in base.kernels if k.dtype == "fp32" and k.loop == "dot"]
    other = tuple(dataclasses.replace(k, values="int8", stored=(0.125, 1.0)) for k in dots)
    monkeypatch.setattr(CPU, "rates_for", lambda *_: dataclasses.replace(base, kernels=other))
    monkeypatch.setattr(CPU, "kernel_texts", texts)
    found = measure(Grid(8).nearest(a_weight(density=0.3)), policy(tmp_path), (1,))
    assert found
    assert all(name.endswith("+int8") for name, _, _ in found)
    assert {dtype for _, dtype in asked} == {"fp32"}
    assert {(r.key.format.partition("+")[2], r.key.dtype) for r in Database(tmp_path).all()} == {("int8", "fp32")}


@pytest.mark.parametrize("values", ["int8", "int4", "ternary", "codebook"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_for_quantised_values_lie_on_their_grid(values: str, dtype: torch.dtype) -> None:
    weight, stored = sample(Pattern("bitmap"), 32, 128, 0.3, values)
    codes = codes_of(weight.to(dtype), Format(Pattern("bitmap"), values))
    assert torch.equal(codes.weight(dtype), weight.to(dtype))
    assert int(weight.count_nonzero()) == stored


def test_every_effort_of_the_options_is_in_the_table() -> None:
    assert tuple(EFFORTS) == ("off", "quick", "full")
    assert options.EFFORTS is EFFORTS
    assert EFFORTS["quick"].candidates < EFFORTS["full"].candidates
    assert set(EFFORTS["quick"].ms) <= {2**i for i in range(20)}


# -------------------------------------------------------------------------------------------------- rates


MACHINE = Rates(1, 2e10, 3e-6, (DenseRate("fp32", ((1, 2e-10), (2, 3e-10))),), (), 2e-6)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """Measuring that takes no time. Holds whether each measurement found the machine busy, oldest first."""
    busy: list[bool] = []

    def measure_machine(*_: object) -> tuple[Rates, bool]:
        busy.append(machine_is_busy[0])
        return MACHINE, machine_is_busy[0]

    machine_is_busy = [False]
    monkeypatch.setattr(MEASURE, "_measure_machine", measure_machine)
    monkeypatch.setattr(MEASURE, "machine_is_busy", machine_is_busy, raising=False)
    known = dict(_machines), dict(_kernels)
    yield busy
    for store, before in zip((_machines, _kernels), known, strict=True):
        store.clear()
        store.update(before)  # type: ignore[arg-type]


def again(cache: Path) -> Rates:
    """As a new process would ask."""
    _machines.clear()
    _kernels.clear()
    return rates(PORTABLE, 1, cache, dtypes=())


def test_a_machine_is_measured_once_and_remembered_on_disk(tmp_path: Path, machine: list[bool]) -> None:
    assert again(tmp_path) == MACHINE
    assert again(tmp_path) == MACHINE
    assert len(machine) == 1
    rates(PORTABLE, 2, tmp_path, dtypes=())
    assert len(machine) == 2


def rates_file(cache: Path) -> Path:
    (path,) = (cache / "rates").glob("machine-*.json")
    return path


def test_damaged_rates_are_measured_again_with_a_warning(tmp_path: Path, machine: list[bool]) -> None:
    again(tmp_path)
    rates_file(tmp_path).write_bytes(b'{"sum": "x", "value": {"value"')
    with pytest.warns(SparsecWarning, match="damaged"):
        assert again(tmp_path) == MACHINE
    assert len(machine) == 2
    assert again(tmp_path) == MACHINE
    assert len(machine) == 2


@pytest.mark.parametrize(
    "change",
    [{"bandwidth": 0.0}, {"overhead": -1.0}, {"dense": []}, {"dense": [{"dtype": "fp32"}]}, {"threads": "many"}],
)
def test_rates_that_cannot_be_true_are_measured_again(
    tmp_path: Path, machine: list[bool], change: dict[str, Any]
) -> None:
    again(tmp_path)
    entry = read_json(rates_file(tmp_path))
    assert entry is not None
    write_json(rates_file(tmp_path), {**entry, "value": {**entry["value"], **change}})
    assert again(tmp_path) == MACHINE
    assert len(machine) == 2


def test_rates_of_a_busy_machine_are_used_but_not_for_long(
    tmp_path: Path, machine: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    MEASURE.machine_is_busy[0] = True
    again(tmp_path)
    again(tmp_path)
    assert machine == [True]
    MEASURE.machine_is_busy[0] = False
    now = time.time()
    monkeypatch.setattr(MEASURE.time, "time", lambda: now + MEASURE.BUSY_S + 1)
    again(tmp_path)
    again(tmp_path)
    assert machine == [True, False]


def test_rates_are_measured_even_where_nothing_can_be_written(
    tmp_path: Path, machine: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lock(path: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(importlib.import_module("sparsec.cache"), "lock", no_lock)
    monkeypatch.setattr(MEASURE, "write_json", lambda path, value: None)
    assert again(tmp_path) == MACHINE


def test_without_a_compiler_only_dense_is_known(
    tmp_path: Path, machine: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    found = rates(PORTABLE, 1, tmp_path, dtypes=("fp32",), wanted=("bitmap", "nm:2:4"))
    assert found == MACHINE
    decision = decide(profile(a_weight()), "fp32", PORTABLE, found, Policy())
    assert not decision.ours
    assert "no sparse kernel" in decision.reason


def test_only_patterns_that_hold_or_could_help_are_asked_for(
    tmp_path: Path, machine: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def texts(pattern: Any, dtype: str, target: Any, x: str) -> list[Any]:
        asked.append(str(pattern))
        return []

    monkeypatch.setattr(MEASURE, "kernel_texts", texts)
    fact = dataclasses.replace(profile(a_weight()), nm=(), blocks=())
    rates_for(fact, "bf16", PORTABLE, 1, tmp_path)
    assert asked == ["panel+bf16", "bitmap+bf16", "index+bf16", "nm:2:4+bf16"]
    _kernels.clear()
    asked.clear()
    rates_for(fact, "fp32", PORTABLE, 1, tmp_path, formats=("index",))
    assert asked == ["index+fp32"]


def test_the_reference_target_has_fixed_rates(tmp_path: Path) -> None:
    assert rates(targets.resolve("reference"), 3, tmp_path) == reference.rates(3)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("truth", [(3e-9, 2e-11, 3e-11), (0.0, 5e-11, 0.0), (0.0, 0.0, 1e-10), (2e-9, 0.0, 1e-10)])
def test_a_fit_finds_the_coefficients_that_made_the_times(truth: tuple[float, float, float]) -> None:
    k, n = 4096, 2**19
    sizes = [(k, 16 * k, k), *((k, n, n // part) for part in (2, 4, 16))]

    def seconds(size: tuple[int, int, int]) -> float:
        return sum(c * s for c, s in zip(truth, size, strict=True))

    assert fit([(*s, seconds(s)) for s in sizes]) == pytest.approx(truth, rel=1e-6, abs=1e-16)
    found = fitted([(*s, m, m * seconds(s)) for s in sizes for m in (4, 1, 16)])
    assert [m for m, *_ in found] == [1, 4, 16]
    for m, *coefficients in found:
        assert coefficients == pytest.approx([m * c for c in truth], rel=1e-6, abs=1e-15)
    if not truth[1]:
        alike = fitted([(*s, 1, seconds(s)) for s in sizes], positions=False)
        assert alike[0][1:] == pytest.approx(truth, rel=1e-6, abs=1e-16)


def test_a_fit_of_noise_is_never_negative() -> None:
    g = torch.Generator().manual_seed(0)
    sizes = [(4096, 2**19, nnz, m) for nnz in (2**18, 2**16, 2**14) for m in (1, 2, 8, 64)]
    for _ in range(50):
        seconds = torch.rand(12, generator=g).tolist()
        found = fitted([(*size, s + 1e-3) for size, s in zip(sizes, seconds, strict=True)])
        assert all(min(c) >= 0 and max(c) > 0 for _, *c in found)


def test_spikes_in_dense_are_taken_out_downward_only() -> None:
    measured = [(1, 1.0), (2, 9.0), (4, 2.0), (8, 3.9), (16, 4.2), (32, 60.0)]
    found = plausible(measured)
    assert found == ((1, 1.0), (2, 2.0), (4, 2.0), (8, 3.9), (16, 4.2), (32, 8.4))
    assert all(after <= before for (_, after), (_, before) in zip(found, measured, strict=True))
    clean = ((1, 1.0), (2, 1.5), (4, 2.5), (8, 4.0))
    assert plausible(list(clean)) == clean


@pytest.mark.parametrize("name", ["bitmap", "nm:2:4", "nm:3:5", "block:16x1", "block:4x4"])
def test_samples_hold_the_pattern_they_are_for(name: str) -> None:
    from sparsec.formats import Pattern, stored_values

    weight, stored = sample(Pattern.parse(name), 64, 120, 0.3)
    fact = profile(weight)
    if name == "nm:2:4":
        found = fact.nm_fact(2, 4)
        assert found is not None
        assert found.exact
    if not name.startswith("nm:3"):
        assert stored_values(Pattern.parse(name), fact) == pytest.approx(stored, abs=64)


def test_best_seconds_goes_on_while_minima_fall(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = iter([(9e-3, 8e-3), (8e-3, 4e-3), (4.1e-3, 5e-3), (1e-3, 1e-3)])
    monkeypatch.setattr(CALLS, "interleave", lambda calls, *_, **__: {name: Samples(next(rounds)) for name in calls})
    monkeypatch.setattr(CALLS, "others_s", lambda: 5.0)
    assert best_seconds({"one": lambda: None}, budget_s=1.0) == ({"one": 4e-3}, False)


def test_minima_that_fall_until_time_is_up_mean_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    falling = (Samples((0.1 / 1.2**i,)) for i in range(1000))
    monkeypatch.setattr(CALLS, "interleave", lambda calls, *_, **__: {name: next(falling) for name in calls})
    assert best_seconds({"one": lambda: None}, budget_s=0.2)[1]


def test_cores_taken_away_all_along_mean_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CALLS, "interleave", lambda calls, *_, **__: {name: Samples((0.01,)) for name in calls})
    taken = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(CALLS, "others_s", lambda: next(taken))
    assert best_seconds({"one": lambda: None}, budget_s=0.2) == ({"one": 0.01}, True)


def test_cold_bytes_outgrow_the_last_cache_within_reason() -> None:
    assert cold_bytes(dataclasses.replace(PORTABLE, l3_bytes=32 << 20)) > 64 << 20
    assert (
        0
        < cold_bytes(dataclasses.replace(PORTABLE, l3_bytes=0))
        <= cold_bytes(dataclasses.replace(PORTABLE, l3_bytes=1 << 40))
    )


def test_the_thread_count_is_put_back_after_an_error() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with thread_count(before + 1):
            assert torch.get_num_threads() == before + 1
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert torch.get_num_threads() == before


# -------------------------------------------------------------------------------------------------- whole


def test_a_real_kernel_is_rated_and_tuned(tmp_path: Path, machine: list[bool]) -> None:
    """Compiles one family for the portable target and runs every step on it."""
    weight = a_weight(64, 256)
    fact = profile(weight)
    found = rates_for(fact, "fp32", PORTABLE, 1, tmp_path, formats=("bitmap",))
    assert {(k.pattern, k.loop) for k in found.kernels} == {("bitmap", "dot"), ("bitmap", "outer")}
    for rate in found.kernels:
        assert rate.bandwidth > 0
        assert [m for m, *_ in rate.points] == [1, 2, 4, 8, 16, 64] or rate.loop == "outer"
        assert all(max(costs) > 0 for _, *costs in rate.points)
    compiled = sorted((tmp_path / "kernels").glob("linear_bitmap*.so"))
    assert len(compiled) == 2
    _kernels.clear()
    assert rates_for(fact, "fp32", PORTABLE, 1, tmp_path, formats=("bitmap",)) == found
    said = policy(tmp_path, formats=("bitmap",))
    with thread_count(1):
        measured = measure(weight, said, (1,))
    assert set(measured) == {("bitmap+fp32", "dot", 1), ("bitmap+fp32", "outer", 1)}
    decision = decide(fact, "fp32", PORTABLE, found, said, measured)
    assert decision.source == "measured"
    assert decision.at(1).format == "bitmap+fp32"


def test_tuning_a_model_reports_every_layer(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.ReLU(), torch.nn.Linear(96, 32)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.rand_like(model[0].weight) < 0.1)
    said = {"target": "reference", "cache_dir": str(tmp_path)}
    summary = sparsec.tune(model, torch.randn(3, 64), options=said)
    assert [(layer.shape, layer.m) for layer in summary.layers] == [((96, 64), 3), ((32, 96), 3)]
    assert all(layer.reason for layer in summary.layers)
    assert (summary.effort, summary.measured, summary.reused, summary.skipped) == ("quick", 0, 0, 0)
    text = str(summary)
    assert "96x64" in text
    assert "0 measured" in text
    assert text.count("\n") == 4


def test_a_wrong_effort_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(BadOptionValue, match="off, quick, full"):
        sparsec.tune(torch.nn.Linear(4, 4), torch.randn(1, 4), effort="fast")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.run(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def a_record() -> Record:
    key = Key("cpu/x", "2.13", 2, "text", "bitmap+fp32", "dot", "fp32", 64, 64, 8, 1, False)
    return Record(key, Ratio(1.5, 1.4, 1.6), 2e-5, 1e-5, 15, 100.0)


def test_show_lists_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "tune", "--show", "--cache-dir", str(tmp_path))
    assert (code, out.split()[0]) == (0, "0")
    Database(tmp_path).save(a_record())
    code, out, _ = run(capsys, "tune", "--show", "--cache-dir", str(tmp_path))
    assert code == 0
    assert "bitmap+fp32/dot" in out
    assert "1.50x" in out
    code, out, _ = run(capsys, "tune", "--show", "--cache-dir", str(tmp_path), "--json")
    assert [entry["ratio"]["value"] for entry in json.loads(out)] == [1.5]


def test_the_tune_command_tunes_each_size_and_prints_only_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--options", '{"target": "reference"}', "--cache-dir", str(tmp_path), "--json"]
    code, out, _ = run(capsys, "tune", "tiny:llama@80", "--batch", "1,2", "--tokens", "4", *chosen)
    assert code == 0
    runs = json.loads(out)["runs"]
    assert [(r["batch"], r["tokens"]) for r in runs] == [(1, 4), (2, 4)]
    assert {layer["m"] for layer in runs[1]["layers"]} == {8}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "a model is needed"),
        (("m", "--effort", "fast"), "quick or full"),
        (("m", "--effort", "ful"), "did you mean 'full'?"),
        (("m", "--budget", "inf"), "at least 0"),
        (("m", "--options", '{"tune": "full"}'), "with --effort"),
        (("m", "--batch", "0"), "numbers of at least 1"),
        (("m", "--options", "{"), "not JSON"),
        (("m", "--options", "[1]"), "JSON object"),
    ],
)
def test_wrong_words_are_one_sentence_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    code, out, err = run(capsys, "tune", *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_an_interrupted_tuning_says_where_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    Database(tmp_path).save(a_record())
    monkeypatch.setattr("sparsec.models.load_model", stopped)
    code, out, err = run(capsys, "tune", "tiny:llama@80", "--cache-dir", str(tmp_path))
    assert (code, out) == (130, "")
    assert "the same command goes on from there" in err
    assert str(Database(tmp_path).path) in err


def test_tuning_into_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("no directory")
    with pytest.raises(TuningNotKept, match="could not be kept"):
        sparsec.tune(torch.nn.Linear(4, 4), torch.randn(1, 4), options={"cache_dir": str(place)})


def test_the_targets_command_names_this_machine_and_all_others(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "targets", "--json")
    told = json.loads(out)
    assert code == 0
    assert [t["name"] for t in told["targets"]] == list(targets.names())
    assert told["this"]["isa"] == targets.resolve("auto").isa
    code, out, _ = run(capsys, "targets")
    assert code == 0
    assert all(name in out for name in targets.names())


def test_targets_shows_rates_when_asked(
    tmp_path: Path, machine: list[bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = (KernelRate("bitmap", "dot", "fp32", ((1, 1e-9, 1e-11, 2e-11), (8, 3e-9, 3e-11, 4e-11)), 2e10),)
    monkeypatch.setattr(MEASURE, "rates", lambda *_: dataclasses.replace(MACHINE, kernels=known))
    code, out, _ = run(capsys, "targets", "--rates", "--cache-dir", str(tmp_path))
    assert code == 0
    assert "20.0 GB/s" in out
    assert "bitmap/dot" in out


def test_failures_to_compile_side_by_side_are_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from sparsec.formats import Pattern

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    texts = kernel_texts(Pattern.parse("bitmap"), "fp32", PORTABLE)
    assert [t.spec.loop for t in texts] == ["dot", "outer"]
    with caplog.at_level(logging.INFO, "sparsec.tune"):
        compile_all(texts, tmp_path)
    assert caplog.text.count("no C++ compiler") == 1


def test_kernel_texts_differ_where_the_kernel_does() -> None:
    from sparsec.formats import Pattern

    names = ("bitmap", "index", "nm:2:4", "nm:8:16", "block:16x1", "block:4x4")
    texts = [t.text for name in names for d in ("fp32", "bf16") for t in kernel_texts(Pattern.parse(name), d, PORTABLE)]
    assert len(texts) == 24
    assert len({text.partition("\n")[2] for text in texts}) >= 20


def test_a_rate_that_was_kept_is_the_rate_that_was_measured() -> None:
    import json
    from dataclasses import asdict

    from sparsec.measure import _kernel_from_json
    from sparsec.targets.base import KernelRate

    rate = KernelRate("bitmap", "dot", "fp32", ((1, 0.0, 1e-12, 2e-12),), bandwidth=1e10)
    back = _kernel_from_json(json.loads(json.dumps(asdict(rate))))
    assert back == rate
    assert hash(back) == hash(rate)  # decisions are remembered by it


def one_kernel(target: targets.base.Target = PORTABLE) -> Text:
    (text,) = (t for t in kernel_texts(Format.parse("bitmap+fp32"), "fp32", target) if t.spec.loop == "dot")
    return text


def test_what_a_kernel_streams_does_not_follow_the_moment_it_was_measured_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same seconds of ours and of dense, three times longer while a neighbour uses the memory; so long that what is
    computed meanwhile does not count."""
    kernels_module = importlib.import_module("sparsec.measure_kernels")
    slower = [1.0]

    def timed(calls: Any, budget_s: float, min_call_s: float = 0.0) -> tuple[dict[str, float], dict[str, float], bool]:
        for call in calls.values():
            call()
        seconds = {name: slower[0] * {"0.5": 2.0, "0.2": 1.0, "dense": 1e-3}[name] for name in calls}
        return seconds, seconds, False

    monkeypatch.setattr(kernels_module, "best_seconds_alone_too", timed)
    machine = dataclasses.replace(MACHINE, overhead=0.0, dense_overhead=0.0)
    quiet, _ = measure_kernel(one_kernel(), PORTABLE, machine, tmp_path)
    slower[0] = 3.0
    busy, _ = measure_kernel(one_kernel(), PORTABLE, machine, tmp_path)
    assert busy.bandwidth == pytest.approx(quiet.bandwidth, rel=1e-2)
    read = Direct(
        sample(Pattern("bitmap"), 4096, 4096, 0.5)[0], Format.parse("bitmap+fp32"), "dot", target="cpu:portable"
    ).packed.bytes
    assert quiet.bandwidth == pytest.approx(read / 2.0 / (4 * 1024 * 1024 / 1e-3), rel=1e-2)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bandwidth", [5e9, 2e10])
def test_what_memory_does_not_hide_is_told_density_by_density(share: float, bandwidth: float) -> None:
    rate, dense = KernelRate("bitmap", "dot", "bf16", ((1, 0.0, 2e-11, 1e-11),)), 1e10
    cold = []
    for kept, exposed in ((0.5, USUALLY_EXPOSED), (0.2, share), (0.05, 0.9)):
        positions, stored = 2048 * 2048, kept * 2048 * 2048
        read = positions / 8 + 2 * stored
        short, long = sorted((read / bandwidth, 2e-11 * positions + 1e-11 * stored))
        cold.append(Cold(2048, positions, stored, read, long + exposed * short, dense))
    found, exposed = memory_of(rate, MACHINE, cold)
    assert found == pytest.approx(bandwidth / dense)
    assert list(exposed) == [pytest.approx(p) for p in ((0.05, 0.9), (0.2, share), (0.5, USUALLY_EXPOSED))]
    known = dataclasses.replace(rate, exposed=exposed)
    assert known.exposed_at(0.35) == pytest.approx((share + USUALLY_EXPOSED) / 2)
    assert (known.exposed_at(0.0), known.exposed_at(1.0)) == (exposed[0][1], exposed[-1][1])
    assert memory_of(rate, MACHINE, cold[:1])[1] == (pytest.approx((0.5, USUALLY_EXPOSED)),)
    alone = dataclasses.replace(known, bandwidth=found * dense, most=0)
    machine = dataclasses.replace(MACHINE, overhead=0.0)
    for c in cold:
        cost = kernel_cost(alone, machine, 2048, 2048, round(c.stored), round(c.read))
        assert cost.at(1) == pytest.approx(c.seconds, rel=1e-3)


def test_what_takes_longer_than_one_after_the_other_is_not_taken_for_more() -> None:
    rate = KernelRate("bitmap", "dot", "bf16", ((1, 0.0, 2e-11, 0.0),))
    cold = [Cold(2048, 2048.0**2, 2048.0**2 * share, 2048.0**2, 1e-2, 1e10) for share in (0.5, 0.2)]
    assert all(found <= 1.0 for _, found in memory_of(rate, MACHINE, cold)[1])


def test_a_kernel_that_only_computes_is_not_said_to_stream_without_end() -> None:
    rate = KernelRate("bitmap", "dot", "bf16", ((1, 0.0, 2e-10, 0.0),))
    cold = [Cold(2048, 2048.0**2, 0.0, 2048.0**2, 2e-10 * 2048**2, 1e10)]
    assert memory_of(rate, MACHINE, cold)[0] == pytest.approx(FASTEST * MACHINE.bandwidth / 1e10)


def test_a_loop_that_rounds_x_is_not_said_to_stream_slower_than_one_that_does_not() -> None:
    points = ((1, 0.0, 0.0, 1e-11),)
    rounds = KernelRate("panel", "dot/int8", "fp32", points, 3.4e10, values="int8")
    plain = dataclasses.replace(rounds, loop="dot", bandwidth=3.5e10)
    other = dataclasses.replace(rounds, values="int4")
    found = _no_slower([plain, rounds, other], MACHINE)
    assert [r.bandwidth for r in found] == [3.5e10, 3.5e10, 3.4e10]


def test_a_loop_that_computes_less_keeps_what_was_measured_of_it() -> None:
    """That of a loop whose arithmetic hides all of memory says nothing of one whose does not."""
    rounds = KernelRate(
        "bitmap", "dot/int8", "fp32", ((1, 0.0, 5e-12, 0.0),), 5e10, values="int8", exposed=((0.5, 1.0),)
    )
    plain = dataclasses.replace(
        rounds, loop="dot", points=((1, 0.0, 2e-11, 0.0),), bandwidth=7e10, exposed=((0.5, 0.4),)
    )
    assert _no_slower([plain, rounds], MACHINE)[1] == rounds
