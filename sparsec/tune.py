"""Measure what the cost model cannot know: a weight in, how many times faster than dense each way to run it is.

One tuner for every machine: what to try comes from the cost model, how much from ``efforts.json``, how a kernel is
timed from the machine's ``Point``. Ratios are kept per hardware, kernel text, shape, pattern, values, density, dtype,
threads and power of two of M; whatever was measured once, by any process, is reused. Processes that tune at the same
time take turns, so that none disturbs another's clock and none repeats its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from sparsec.cache import one_at_a_time
from sparsec.efforts import EFFORTS, Effort
from sparsec.facts import Conv, WeightFact
from sparsec.measure import BUSY_S
from sparsec.measure_calls import tune_log
from sparsec.options import Policy
from sparsec.passes.decide import Gates, bucket
from sparsec.targets.base import Target
from sparsec.targets.cuda import GpuTarget
from sparsec.timing import Ratio, certain
from sparsec.tune_db import Database
from sparsec.tune_point import Point, Timed, Trial
from sparsec.tune_record import Key, Record

_log = tune_log()
_SMALLEST_ROOM_S = 1e-3


@dataclass
class Session:
    """One tuning of one process: what is left of its budget, and what came of it.

    ``strict``: raise TuningNotKept where a measurement cannot be kept.
    """

    left_s: float
    on_point: Callable[[int], None] | None = None
    strict: bool = False
    measured: list[Record] = field(default_factory=list)
    reused: list[Record] = field(default_factory=list)
    skipped: int = 0  # ways that were left to the model because the budget was used up


_sessions: list[Session] = []  # those opened with `tuning`, innermost last
_process: dict[float, Session] = {}  # what compilations use, by budget: a budget is for the whole process


@contextmanager
def tuning(budget_s: float, on_point: Callable[[int], None] | None = None, strict: bool = False) -> Iterator[Session]:
    """Measure under a fresh budget inside the block. ``on_point(n)`` is called after each weight and M."""
    session = Session(budget_s, on_point, strict)
    _sessions.append(session)
    try:
        yield session
    finally:
        _sessions.remove(session)


def _session(policy: Policy) -> Session:
    if _sessions:
        return _sessions[-1]
    return _process.setdefault(policy.tune_budget_s, Session(policy.tune_budget_s))


@torch.no_grad()
def measured_for(
    weight: torch.Tensor,
    fact: WeightFact,
    dtype: str,
    target: Target,
    policy: Policy,
    ms: Sequence[int] = (),
    x: str = "",
    conv: Conv | None = None,
    gates: Gates = (),
) -> dict[tuple[str, str, int], Ratio]:
    """What is measured about running ``weight`` [N, K]: (format, loop, M bucket) -> times faster than dense.

    ``ms``: the rows of x that matter (none: those of the effort). ``x``: "int8" where the graph rounds x to it.
    ``conv``: of a convolution, which is then what is measured, on the images that it says. ``gates``: loops that read
    what the zeros of activations leave of the weight, with the share that they are measured with. Known
    records are reused; the others are measured while the budget lasts, and each is on disk before the next begins. An
    empty answer means: decide by the model.
    """
    effort = EFFORTS[policy.tune]
    session = _session(policy)
    if not effort.candidates or fact.nonfinite or target.name == "reference":
        return {}
    point = _point(weight, fact, dtype, target, policy, x, conv, gates)
    database = Database.of(policy.cache_dir, session.strict)
    found: dict[tuple[str, str, int], Ratio] = {}
    for m in dict.fromkeys(bucket(m) for m in ms or effort.ms):
        trials = point.trials(m, effort)
        for record in _known_or_measured(point, trials, m, effort, database, session):
            way = record.key.format, record.key.loop.partition("@")[0], m
            if way not in found or record.ratio.low > found[way].low:  # of its configurations the surest gain counts
                found[way] = record.ratio
        if session.on_point:
            session.on_point(len(session.measured) + len(session.reused))
    return found


def _known_or_measured(
    point: Point, trials: Mapping[Key, Trial], m: int, effort: Effort, database: Database, session: Session
) -> Iterable[Record]:
    """The records of the trials: those on disk that will do, and the others measured now, as far as the budget goes."""
    known = database.load(trials)
    missing = _to_measure(trials, known, effort)
    made: dict[Key, Record] = {}
    if missing and session.left_s >= _SMALLEST_ROOM_S:
        with one_at_a_time(database.path.with_name("tuning.lock")):
            known = database.load(trials)  # the process that was waited for may have measured just these
            missing = _to_measure(trials, known, effort)
            started = time.perf_counter()
            timed = point.measure(missing, m, effort, session.left_s) if missing else None
            whole = session.left_s >= effort.point_s
            for record in _records(timed, missing, effort.name if whole else "") if timed else ():
                database.save(record)
                session.measured.append(record)
                made[record.key] = record
            session.left_s -= time.perf_counter() - started
            session.skipped += sum(key in timed.late for key in missing) if timed else 0
    else:
        session.skipped += sum(key not in known for key in missing)
    kept = {key: record for key, record in known.items() if key not in made}
    session.reused += (_expected_now(record, trials[key]) for key, record in kept.items())
    return [*kept.values(), *made.values()]


def _to_measure(trials: Mapping[Key, Trial], known: Mapping[Key, Record], effort: Effort) -> dict[Key, Trial]:
    """Trials without a record, or with one of less effort, or of a busy moment that is some time past.

    Where the budget does not allow to measure these again, what is known of them is used.
    """
    return {key: trial for key, trial in trials.items() if key not in known or not _settled(known[key], effort)}


def _settled(record: Record, effort: Effort) -> bool:
    if record.busy and time.time() - record.when > BUSY_S:
        return False
    return record.effort in EFFORTS and EFFORTS[record.effort].covers(effort)


def _records(timed: Timed, trials: Mapping[Key, Trial], effort: str) -> Iterator[Record]:
    """``effort``: its name, or nothing where the budget cut it short.

    What others did to the clock may have been to dense alone, all the time. So on a busy machine measuring only takes
    away from what the model promises: it is measured again when the machine may be quiet.
    """
    base = timed.dense
    for key, ours in timed.ways.items():
        ratio, trial = certain(base, ours), trials[key]
        if timed.busy:
            ratio = replace(ratio, low=min(ratio.low, trial.promised))
        said = " on a busy machine" if timed.busy else ""
        _log.info("%s %dx%d M=%d: %.2fx, surely %.2fx%s", key.name, key.n, key.k, key.m, ratio.value, ratio.low, said)
        yield Record(
            key, ratio, base.best, ours.best, len(ours.seconds), time.time(), effort, timed.busy,
            trial.model_dense_s, trial.model_s,
        )  # fmt: skip


def _expected_now(record: Record, trial: Trial) -> Record:
    """With what the cost model says of it today."""
    return replace(record, model_s=trial.model_s, model_dense_s=trial.model_dense_s)


def _point(
    weight: torch.Tensor, fact: WeightFact, dtype: str, target: Target, policy: Policy, x: str, conv: Conv | None,
    gates: Gates,
) -> Point:  # fmt: skip
    if isinstance(target, GpuTarget):
        from sparsec.tune_gpu import GpuPoint

        return GpuPoint(weight, fact, dtype, target, policy, gates)
    from sparsec.tune_cpu import CpuPoint

    return CpuPoint(weight, fact, dtype, target, policy, torch.get_num_threads(), x, conv, gates)
