"""What this machine can do, measured once: a target, a thread count and a cache directory in, ``Rates`` out.

How fast memory streams, how long a dense linear takes at ten row counts with weights that are in no cache, what a
call costs, and the rate of each sparse kernel (``measure_kernels.py``). The machine's part takes about four seconds,
each kernel half of one after it is compiled. Both are kept as JSON in ``<cache>/rates``, a kernel's under the hash of
its text. What was measured on a busy machine is used, but measured again when it is ten minutes old.

Dense and sparse must not be compared across the moments of a machine that others use. Two threads of a virtual
machine may share a core for seconds, and then two are as fast as one: kernels are timed on one thread and scaled as
dense was seen to scale. Memory is several times slower at one moment than at another: what a kernel streams is kept
as a multiple of what dense streamed in the same moment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from sparsec import gpu_rates
from sparsec.cache import digest, one_at_a_time, read_json, write_json
from sparsec.codegen.spec import KernelSpec
from sparsec.errors import BuildError, PackError
from sparsec.facts import WeightFact
from sparsec.formats import BOOKS, Format, Pattern
from sparsec.measure_calls import (
    best_seconds,
    best_seconds_alone_too,
    cold_bytes,
    cold_linear,
    plausible,
    thread_count,
    tune_log,
)
from sparsec.measure_conv import dense_conv, gather_rate
from sparsec.measure_kernels import MOST_EXPOSED, SIDE, TORCH, Text, compile_all, direct, kernel_texts, measure_kernel
from sparsec.passes.decide.candidates import allowed, formats_of, patterns
from sparsec.passes.decide.cost import kernel_cost
from sparsec.passes.decide.gates import KINDS
from sparsec.quiet import wait_for_cores
from sparsec.targets import reference
from sparsec.targets.base import DenseRate, KernelRate, Rates, Target
from sparsec.targets.cuda import GpuTarget

VERSION = "14"  # of what is measured and how; another one measures again
MS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Measured even where a weight does not have the pattern: `explain` says what it would give.
USUAL = ("panel", "bitmap", "index", "nm:2:4")
BUSY_S = 600.0

_log = tune_log()
_machines: dict[tuple[str, int, str], Rates] = {}
_kernels: dict[tuple[str, int, str, str, str], tuple[KernelRate, ...]] = {}
_T = TypeVar("_T", Rates, KernelRate)


def rates(
    target: Target,
    threads: int,
    cache: Path,
    dtypes: Iterable[str] = tuple(TORCH),
    wanted: Iterable[str] = (*USUAL, "block:16x1"),
) -> Rates:
    """The rates of ``target`` with ``threads`` threads, from the cache or measured now.

    ``wanted``: patterns, or formats where values are not stored as x is, whose kernels to know; each costs a
    compilation the first time. Kernels that cannot be built here are left out, so without a compiler only dense is
    known. A damaged cache entry is measured again.
    """
    if target.name == "reference":
        return reference.rates(threads)
    if isinstance(target, GpuTarget):  # what its code and its data sheet say; measuring is tuning's
        return gpu_rates.rates(target, tuple(map(Pattern.parse, wanted)))
    place = (target.fingerprint, threads, str(cache))
    if place not in _machines:
        path = cache / "rates" / f"machine-{digest(target.fingerprint, str(threads), torch.__version__, VERSION)}.json"
        _machines[place] = _stored(path, _machine_from_json, partial(_measure_machine, target, threads, cache))
    machine = _machines[place]
    pairs = list(dict.fromkeys((name, dtype) for dtype in dtypes for name in wanted))
    new = [(name, dtype) for name, dtype in pairs if (*place, name, dtype) not in _kernels]
    texts = {pair: kernel_texts(_named(*pair), pair[1], target, pair[0].partition("/")[2]) for pair in new}
    compile_all([t for found in texts.values() for t in found], cache)
    for pair, found in texts.items():
        rated = (_kernel_rate(t, target, machine, cache) for t in found)
        _kernels[(*place, *pair)] = tuple(r for r in rated if r is not None)
    return replace(machine, kernels=_no_slower([r for pair in pairs for r in _kernels[(*place, *pair)]], machine))


def _no_slower(kernels: list[KernelRate], machine: Rates) -> tuple[KernelRate, ...]:
    """Loops on rounded x, which compute less with the same bytes, take no longer than those on x as it is: where they
    were measured to, that is noise between two moments, and would choose the one that computes more."""
    plain = {(r.pattern, r.dtype, r.values, r.loop): r for r in kernels}
    found = []
    for r in kernels:
        other = plain.get((r.pattern, r.dtype, r.values, r.loop.partition("/")[0]), r)
        slower = _from_memory(r, machine) > _from_memory(other, machine)
        found.append(replace(r, bandwidth=other.bandwidth, exposed=other.exposed) if slower else r)
    return tuple(found)


def _from_memory(rate: KernelRate, machine: Rates) -> float:
    """Seconds on a weight that keeps a quarter, in bytes, and is in no cache."""
    n = k = 2048
    return kernel_cost(rate, machine, n, k, n * k // 4, n * k // 4).at(1)


def _named(name: str, dtype: str) -> Format:
    """``bitmap`` with values as x has them, ``bitmap+int8`` as it says; ``bitmap+int8/int8`` where x is rounded too."""
    name = name.partition("/")[0]
    return Format.parse(name) if "+" in name else Format(Pattern.parse(name), dtype)


def rates_for(
    fact: WeightFact,
    dtype: str,
    target: Target,
    threads: int,
    cache: Path,
    formats: tuple[str, ...] = (),
    x: str = "",
    loops: tuple[str, ...] = (),
) -> Rates:
    """The rates that deciding one weight needs: of the formats it holds and the policy allows, with x of one dtype.

    ``x``: "int8" where the graph rounds x to it. ``loops``: those of activation sparsity that may serve it.
    """
    if isinstance(target, GpuTarget):
        return gpu_rates.rates_for(target, fact, formats)
    held = dict.fromkeys((*(Pattern.parse(name) for name in USUAL), *patterns(fact)))
    wanted = [str(p) for p in held if allowed(p, formats)]
    codes = [f for f in formats_of(fact, dtype) if f.values != dtype and allowed(f, formats)]
    small = {f.pattern for f in codes if f.values == "codebook2"}  # always faster than 4 bits, as 3 bits are not
    codes = [f for f in codes if f.values != "codebook" or f.pattern not in small]
    wanted += [*map(str, codes), *(f"{f}/{x}" for f in codes if x and f.values not in BOOKS)]
    parts = [f for f in formats_of(fact, dtype) if f.pattern.kind in KINDS and allowed(f, formats)]
    wanted += [f"{f}/{loop}" for f in parts for loop in loops]
    return rates(target, threads, cache, (dtype,) if dtype in TORCH else (), wanted)


def _kernel_rate(t: Text, target: Target, machine: Rates, cache: Path) -> KernelRate | None:
    """The rate of one loop with the machine's threads and memory; None where it cannot be built."""
    threads = machine.threads
    key = digest(target.fingerprint, str(threads), t.spec.name, t.text, torch.__version__, VERSION)

    def measure() -> tuple[KernelRate, bool]:
        _log.info("measuring %s with %d threads", t.spec.name, threads)
        wait_for_cores(threads)
        with thread_count(threads):
            return measure_kernel(t, target, machine, cache)

    try:
        alone = _stored(cache / "rates" / f"kernel-{key}.json", _kernel_from_json, measure)
    except (BuildError, PackError) as error:
        _log.info("%s is not used: %s", t.spec.name, error)
        return None
    points = tuple((m, c / machine.scaling, p / machine.scaling, z / machine.scaling) for m, c, p, z in alone.points)
    return replace(alone, points=points, bandwidth=alone.bandwidth * machine.dense_bandwidth)


@torch.no_grad()
def _measure_machine(target: Target, threads: int, cache: Path) -> tuple[Rates, bool]:
    _log.info("measuring %s with %d threads (once, a few seconds)", target.model, threads)
    wait_for_cores(threads)
    with thread_count(threads):
        ours, theirs = _overheads(target, cache)
        cold = cold_bytes(target)
        dense, scaling, busy = zip(*(_dense(name, dtype, cold, theirs) for name, dtype in TORCH.items()), strict=True)
        conv, conv_busy = zip(*(dense_conv(name, theirs) for name in TORCH), strict=True)
        gather = gather_rate(target, cache)
        buffer = torch.ones(cold // 4)
        seconds, _ = best_seconds({"sum": buffer.sum}, budget_s=0.3)
        bandwidth = buffer.numel() * 4 / seconds["sum"]
    most = min(max(scaling), float(threads))
    found = Rates(threads, bandwidth, ours, dense, (), theirs, most, conv, gather / most)
    return found, any(busy) or any(conv_busy)


def _dense(name: str, dtype: torch.dtype, cold: int, overhead: float) -> tuple[DenseRate, float, bool]:
    """Seconds per weight of ``F.linear`` at each M, how many times faster all threads are than one where arithmetic
    counts, and whether the machine was busy. Every call reads a weight that the caches have forgotten."""
    size = SIDE * SIDE
    linear = cold_linear(dtype, SIDE, cold)
    calls = {str(m): partial(linear, torch.randn(m, SIDE).to(dtype)) for m in MS}
    seconds, alone, busy = best_seconds_alone_too(calls, budget_s=0.9)
    points = plausible([(m, max(seconds[str(m)] - overhead, 0.1 * seconds[str(m)]) / size) for m in MS])
    scaling = max(alone[str(m)] / seconds[str(m)] for m in MS[-3:])
    return DenseRate(name, points), scaling, busy


def _overheads(target: Target, cache: Path) -> tuple[float, float]:
    """Seconds of a call that has next to nothing to do: ours (dense's where none can be built), dense."""
    weight = torch.ones(64, 64)
    x = torch.randn(8, 64)  # just enough work for ours to use all threads
    calls: dict[str, Callable[[], object]] = {"dense": lambda: torch.nn.functional.linear(x, weight)}
    spec = KernelSpec(Format.parse("bitmap+fp32"), "dot", "fp32", target.isa)
    try:
        calls["ours"] = partial(direct(weight, spec, target, cache), x)
    except (BuildError, PackError) as error:
        _log.info("no call overhead measured: %s", error)
    seconds, _ = best_seconds(calls, budget_s=0.2, min_call_s=2e-4)
    return seconds.get("ours", seconds["dense"]), seconds["dense"]


# -------------------------------------------------------------------------------------------------- kept as JSON


def _stored(path: Path, read: Callable[[Any], _T], make: Callable[[], tuple[_T, bool]]) -> _T:
    """What ``path`` holds, else what ``make`` gives. Processes that share a cache measure one after the other."""
    if (found := _read(path, read)) is not None:
        return found
    with one_at_a_time(path.with_name("measuring.lock")):
        if (found := _read(path, read)) is not None:
            return found
        made, busy = make()
        write_json(path, {"value": asdict(made), "busy_at": time.time() if busy else 0.0})
        return made


def _read(path: Path, read: Callable[[Any], _T]) -> _T | None:
    entry = read_json(path)
    if entry is None:
        return None
    try:
        if entry["busy_at"] and time.time() - entry["busy_at"] > BUSY_S:
            return None
        return read(entry["value"])
    except (KeyError, TypeError, ValueError):  # whole, but not of this code
        return None


def _machine_from_json(value: dict[str, Any]) -> Rates:
    dense, conv = (
        tuple(DenseRate(d["dtype"], tuple((int(m), float(s)) for m, s in d["points"])) for d in value[name])
        for name in ("dense", "conv")
    )
    bandwidth, scaling, ours, theirs, gather = (
        float(value[name]) for name in ("bandwidth", "scaling", "overhead", "dense_overhead", "gather")
    )
    wrong = bandwidth <= 0 or scaling < 1 or min(ours, theirs, gather) < 0
    wrong |= any(s <= 0 for d in (*dense, *conv) for _, s in d.points) or not all(d.points for d in conv)
    if not dense or wrong:
        raise ValueError("not a machine")
    return Rates(int(value["threads"]), bandwidth, ours, dense, (), theirs, scaling, conv, gather)


def _kernel_from_json(value: dict[str, Any]) -> KernelRate:
    points = tuple((int(m), float(c), float(p), float(nonzero)) for m, c, p, nonzero in value["points"])
    position, kept = value.get("stored", (0.0, 0.0))
    exposed = tuple((float(share), float(found)) for share, found in value["exposed"])
    tuples = {"points": points, "stored": (float(position), float(kept)), "exposed": exposed}  # JSON has none
    rate = KernelRate(**{**value, **tuples})
    wrong = rate.bandwidth < 0 or any(min(p) < 0 or p[0] < 1 for p in points) or list(exposed) != sorted(exposed)
    if not points or wrong or any(not 0 <= share <= 1 or not 0 <= found <= MOST_EXPOSED for share, found in exposed):
        raise ValueError("not a rate")
    return rate
