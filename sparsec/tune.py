"""Measure what the cost model cannot know: a weight in, how many times faster than dense each way to run it is.

Each candidate runs interleaved with dense ``F.linear`` (what Inductor calls for a linear) on copies of the weight used
in turn, so that, as inside a model, no call finds its weight in a cache. Ratios are kept per hardware, kernel text,
shape, pattern, density, dtype, threads and power of two of M; whatever was measured once, by any process, is reused.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from sparsec import targets
from sparsec.cache import cache_dir, digest
from sparsec.codegen.spec import Packed
from sparsec.errors import BuildError, PackError
from sparsec.facts import WeightFact
from sparsec.formats import Format
from sparsec.measure import rates_for
from sparsec.measure_calls import cold_bytes, tune_log
from sparsec.measure_kernels import Text, direct, kernel_texts
from sparsec.options import Options, Policy
from sparsec.passes.decide import bucket
from sparsec.passes.decide.candidates import Way, dense_way, ways_for
from sparsec.records import LayerRecord
from sparsec.targets.base import Target
from sparsec.targets.cuda import GpuTarget
from sparsec.timing import Ratio, interleave, speedup
from sparsec.tune_db import Database, Key, Record

_log = tune_log()


@dataclass(frozen=True)
class Effort:
    """How much to measure. ``candidates``: sparse ways per M, best by the model first. ``ms``: where M is dynamic.

    ``hopeless``: ways that the model puts at more than so many times dense are not tried. ``point_s``: seconds spent
    on the rounds of one weight at one M, at least five rounds.
    """

    candidates: int
    hopeless: float
    ms: tuple[int, ...]
    rounds: int
    point_s: float


# The whole difference between the efforts is this table.
EFFORTS: Mapping[str, Effort] = {
    "off": Effort(candidates=0, hopeless=0.0, ms=(), rounds=0, point_s=0.0),
    "quick": Effort(candidates=3, hopeless=1.5, ms=(1, 16, 128), rounds=15, point_s=0.5),
    "full": Effort(candidates=12, hopeless=3.0, ms=(1, 2, 4, 8, 16, 32, 64, 128, 256), rounds=40, point_s=3.0),
}
_COLD_FROM = 2**17  # bytes of dense weight; a smaller one is measured where it is, its time is the call's
_SMALLEST_ROOM_S = 1e-3


@dataclass
class Session:
    """One tuning of one process: what is left of its budget, and what came of it."""

    left_s: float
    on_point: Callable[[int], None] | None = None
    measured: list[Record] = field(default_factory=list)
    reused: list[Record] = field(default_factory=list)
    skipped: int = 0  # ways that were left to the model because the budget was used up


_sessions: list[Session] = []  # those opened with `tuning`, innermost last
_process: dict[float, Session] = {}  # what compilations use, by budget: a budget is for the whole process


@contextmanager
def tuning(budget_s: float, on_point: Callable[[int], None] | None = None) -> Iterator[Session]:
    """Measure under a fresh budget inside the block. ``on_point(n)`` is called after each weight and M."""
    session = Session(budget_s, on_point)
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
) -> dict[tuple[str, str, int], Ratio]:
    """What is measured about running ``weight`` [N, K]: (format, loop, M bucket) -> times faster than dense.

    ``ms``: the rows of x that matter (none: those of the effort). Known records are reused; the others are measured
    while the budget lasts, and each is on disk before the next begins. An empty answer means: decide by the model.
    """
    effort = EFFORTS[policy.tune]
    session = _session(policy)
    if not effort.candidates or fact.nonfinite or target.name == "reference":
        return {}
    point = _point(weight, fact, dtype, target, policy)
    database = Database(cache_dir(policy.cache_dir))
    found: dict[tuple[str, str, int], Ratio] = {}
    for m in dict.fromkeys(bucket(m) for m in ms or effort.ms):
        wanted = point.ways(m, effort)
        known = database.load(wanted)
        session.reused += known.values()
        missing = {key: text for key, text in wanted.items() if key not in known}
        started = time.perf_counter()
        if missing and session.left_s >= _SMALLEST_ROOM_S:
            for record in point.measure(missing, m, effort, session.left_s):
                database.save(record)
                session.measured.append(record)
                known[record.key] = record
            session.left_s -= time.perf_counter() - started
        elif missing:
            session.skipped += len(missing)
        for key, record in known.items():
            way = key.format, key.loop.partition("@")[0], m  # of a kernel's configurations the surest gain counts
            if way not in found or record.ratio.low > found[way].low:
                found[way] = record.ratio
        if session.on_point:
            session.on_point(len(session.measured) + len(session.reused))
    return found


def _point(weight: torch.Tensor, fact: WeightFact, dtype: str, target: Target, policy: Policy) -> Any:
    """What measures one weight on its machine: ``ways`` and ``measure``."""
    if isinstance(target, GpuTarget):
        from sparsec.tune_gpu import GpuPoint

        return GpuPoint(weight, fact, dtype, target, policy)
    return _Point(weight, fact, dtype, target, policy, torch.get_num_threads())


@dataclass(frozen=True)
class _Point:
    """One weight on one machine: which ways to measure, and their measurement."""

    weight: torch.Tensor
    fact: WeightFact
    dtype: str
    target: Target
    policy: Policy
    threads: int

    def ways(self, m: int, effort: Effort) -> dict[Key, Text]:
        """The sparse ways worth measuring at M = ``m``, cheapest by the model first."""
        cache = cache_dir(self.policy.cache_dir)
        rates = rates_for(self.fact, self.dtype, self.target, self.threads, cache, self.policy.formats)
        dense = dense_way(self.fact, self.dtype, rates)
        if dense is None:
            return {}
        ways = ways_for(self.fact, self.dtype, rates, self.policy)
        limit = float("inf") if self.policy.min_speedup == 0 else effort.hopeless * dense.cost.at(m)
        ways = sorted((w for w in ways if w.cost.at(m) <= limit), key=lambda w: w.cost.at(m))[: effort.candidates]
        pairs = ((self._text(way), way) for way in ways)
        return {self._key(text, way, m): text for text, way in pairs if text is not None}

    def _text(self, way: Way) -> Text | None:
        pattern = Format.parse(way.format).pattern
        return next((t for t in kernel_texts(pattern, self.dtype, self.target) if t.spec.loop == way.kernel), None)

    def _key(self, text: Text, way: Way, m: int) -> Key:
        fact = self.fact
        return Key(
            self.target.fingerprint, torch.__version__, self.threads, digest(text.text), way.format, way.kernel,
            self.dtype, fact.n, fact.k, round(40 * fact.density), m, self._cold,
        )  # fmt: skip

    @property
    def _cold(self) -> bool:
        return self.weight.numel() * self.weight.element_size() >= _COLD_FROM

    def measure(self, wanted: Mapping[Key, Text], m: int, effort: Effort, budget_s: float) -> Iterator[Record]:
        """Run the wanted ways against dense in the same rounds."""
        dense = itertools.cycle(self._copies(self.weight))
        x = torch.randn(m, self.fact.k, generator=torch.Generator().manual_seed(0)).to(self.weight.dtype)
        calls: dict[str, Callable[[], object]] = {"dense": lambda: torch.nn.functional.linear(x, next(dense))}
        packs: dict[str, list[Packed]] = {}
        for key, text in wanted.items():
            try:
                runs = self._runs(text, packs)
            except (BuildError, PackError) as error:  # the decision meets it again, and records it
                _log.info("%s is not measured: %s", text.spec.name, error)
                continue
            calls[key.id] = partial(_next_call, itertools.cycle(runs), x)
        if len(calls) == 1:
            return
        budget = min(effort.point_s, budget_s)
        samples = interleave(calls, effort.rounds, budget, min_call_s=0.0 if self._cold else 2e-4)
        for key in (key for key in wanted if key.id in samples):
            ours, base = samples[key.id], samples["dense"]
            record = Record(key, speedup(base, ours), base.best, ours.best, len(ours.seconds), time.time())
            _log.info("%s %dx%d M=%d: %.2fx", text_of(key), key.n, key.k, m, record.ratio.value)
            yield record

    def _runs(self, text: Text, packs: dict[str, list[Packed]]) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """The kernel on as many copies of the pack as it takes to outgrow the caches; loops share the copies."""
        cache = cache_dir(self.policy.cache_dir)
        weight = self.weight.detach()
        name = str(text.spec.format)
        if name not in packs:
            packed = direct(weight, text.spec, self.target, cache).packed
            times = _copies_for(packed.bytes, self.target) if self._cold else 1
            copies = (tuple(t.clone() for t in packed.tensors) for _ in range(times - 1))
            packs[name] = [packed, *(replace(packed, tensors=tensors) for tensors in copies)]
        return [direct(weight, text.spec, self.target, cache, packed) for packed in packs[name]]

    def _copies(self, weight: torch.Tensor) -> list[torch.Tensor]:
        size = weight.numel() * weight.element_size()
        times = _copies_for(size, self.target) if self._cold else 1
        return [weight.detach(), *(weight.detach().clone() for _ in range(times - 1))]


def _copies_for(size: int, target: Target) -> int:
    return -(-cold_bytes(target) // max(size, 1))


def _next_call(runs: Iterator[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    return next(runs)(x)


def text_of(key: Key) -> str:
    """``bitmap+fp32/dot``."""
    return f"{key.format}/{key.loop}"


# -------------------------------------------------------------------------------------------------- the public call


@dataclass(frozen=True)
class TunedLayer:
    """One weight at the M of the inputs (0: dynamic, shown at 1): what runs, and its measured speedup (0: none)."""

    name: str
    shape: tuple[int, int]
    m: int
    format: str
    speedup: float
    reason: str


@dataclass(frozen=True)
class TuneSummary:
    """What tuning a model came to. ``measured`` and ``reused`` count records, ``skipped`` ways the budget left out."""

    machine: str
    threads: int
    effort: str
    layers: tuple[TunedLayer, ...]
    measured: int
    reused: int
    skipped: int
    seconds: float  # of everything
    measuring_s: float  # of what the budget bounds
    database: str

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=4)
        lines = [f"{'layer':{width}}  {'shape':>11}  {'M':>5}  {'runs':14}  {'speedup':>7}  why"]
        for layer in self.layers:
            shape = f"{layer.shape[0]}x{layer.shape[1]}"
            gain = f"{layer.speedup:.2f}x" if layer.speedup else "-"
            what = f"{layer.name:{width}}  {shape:>11}  {layer.m or 'any':>5}"
            lines.append(f"{what}  {layer.format:14}  {gain:>7}  {layer.reason}")
        lines.append(
            f"{self.measured} measured, {self.reused} known before, {self.skipped} left out by the budget; "
            f"{self.seconds:.1f} s, effort {self.effort}, {self.threads} threads, {self.machine}"
        )
        lines.append(f"kept in {self.database}")
        return "\n".join(lines)


def tune(
    model: torch.nn.Module,
    *args: Any,
    effort: str = "quick",
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> TuneSummary:
    """Measure the decisions of ``model(*args, **kwargs)`` on this machine and keep them for every later compilation.

    ``effort``: quick or full. ``options``: those of ``torch.compile``; ``tune_budget_s`` bounds the measuring. The
    model runs once, eagerly, and is not changed. Compile with ``options={"tune": effort}`` to use what was measured.
    Raises OptionError.
    """
    return tune_with(model, args, kwargs, Options.parse({**(options or {}), "tune": effort}))


def tune_with(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    on_point: Callable[[int], None] | None = None,
) -> TuneSummary:
    """``tune`` with checked options, whose policy holds the effort. ``on_point``: as in ``tuning``."""
    from sparsec.pipeline import inspect, placed  # the pipeline itself measures through this module

    options = placed(options, model)
    policy = options.policy
    started = time.perf_counter()
    with tuning(policy.tune_budget_s, on_point) as session, torch.no_grad():
        records = inspect(model, args, kwargs, options)
    return TuneSummary(
        machine=targets.resolve(policy.target).model,
        threads=torch.get_num_threads(),
        effort=policy.tune,
        layers=tuple(_tuned(layer) for record in records for layer in record.layers),
        measured=len(session.measured),
        reused=len(session.reused),
        skipped=session.skipped,
        seconds=time.perf_counter() - started,
        measuring_s=policy.tune_budget_s - session.left_s,
        database=str(Database(cache_dir(policy.cache_dir)).path),
    )


def _tuned(layer: LayerRecord) -> TunedLayer:
    shape, kind = layer.site.x_shape, layer.site.kind
    sizes = (shape[0], *shape[2:]) if kind == "conv1x1" else shape[:-1]
    m = math.prod(size if isinstance(size, int) else 0 for size in sizes)
    ran = layer.decision.at(max(m, 1))
    measured = layer.decision.source in ("measured", "forced") and ran.format != "dense" and ran.ours_s
    return TunedLayer(
        layer.name, (layer.fact.n, layer.fact.k), m, ran.format, ran.dense_s / ran.ours_s if measured else 0.0,
        layer.decision.reason,
    )  # fmt: skip
