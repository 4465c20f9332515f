"""What one sparse kernel costs: a spec's text in, a fitted ``KernelRate`` out.

Two runs tell arithmetic and memory apart. On weights that fit the caches, at several densities and M, time is
arithmetic: three coefficients are fitted for each M. On copies of a large weight, used in turn so that none is in a
cache when its turn comes, time is memory and what of the arithmetic it does not hide, which two densities tell apart:
bytes over seconds, beside those of a dense linear in the same rounds.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sparsec.codegen import build, cpp
from sparsec.codegen.cpp.pages import in_large_pages
from sparsec.codegen.spec import KernelSpec, Packed
from sparsec.errors import NoCompiler, PackError
from sparsec.facts import Conv
from sparsec.formats import BOOKS, Format, Pattern, value_kind
from sparsec.measure_calls import (
    best_seconds,
    best_seconds_alone_too,
    cold_bytes,
    cold_linear,
    plausible,
    thread_count,
    tune_log,
)
from sparsec.passes.decide.candidates import PARTS_OF_WEIGHT
from sparsec.passes.graph import DTYPES
from sparsec.runtime.direct import Direct
from sparsec.targets.base import KernelRate, Rates, Target

TORCH = {name: dtype for dtype, name in DTYPES.items()}

# Of dense weights: calls as short as those of the sparse kernels, since on a shared machine the shortest calls find the
# quietest moments, and sparse would look better than it is.
SIDE = 1024
_SMALL = (256, 2048)  # fits the second-level cache in most formats, while x of many rows does not fit the first
_FEW = 128  # columns of one tile that take no time beside the call itself
# Of calls from memory: as layers of language models are. In smaller ones what a call costs that finds nothing in any
# cache looks like slow memory; and of kernels that read a part each column or row is at a place of its own.
_LARGE = (4096, 4096)
_LEAST_S = 1e-3  # of one timing; shorter calls are repeated
_LOOP_MS = {"dot": (1, 2, 4, 8, 16, 64), "outer": (8, 16, 64, 256), **dict.fromkeys(PARTS_OF_WEIGHT, (1, 2, 4, 8))}
_OTHER_MS = (1, 8, 64)
_DENSITIES = (0.5, 0.2, 0.05)
USUALLY_EXPOSED = 0.4  # of the shorter of memory and arithmetic, where a weight keeps most: the longer hides the rest
MOST_EXPOSED = 1.0  # memory and arithmetic one after the other
FASTEST = 1.25  # times what a sum over a buffer reads: what is hidden behind arithmetic is not said to be faster
_LEFT = 0.25  # share of columns or rows that kernels of activation sparsity are measured with

_log = tune_log()


@dataclass(frozen=True)
class Text:
    """A kernel's text and what it is for."""

    spec: KernelSpec
    text: str

    @property
    def pattern(self) -> Pattern:
        return self.spec.format.pattern

    @property
    def values(self) -> str:
        """How values are stored; empty where as x."""
        return "" if self.spec.format.values == self.spec.dtype else self.spec.format.values


def kernel_texts(wanted: Format | Pattern, dtype: str, target: Target, x: str = "") -> list[Text]:
    """The C++ text of every loop of a format; none where its family does not take these parameters or values.

    ``dtype``: of x, and of the values of a bare pattern. ``x``: what the kernels round x to, or the one loop that is
    wanted of those that read a part of the weight.
    """
    format = wanted if isinstance(wanted, Format) else Format(wanted, dtype)
    found = []
    part, x = (x, "") if x in PARTS_OF_WEIGHT else ("", x)
    try:
        family = cpp.family(format.pattern.kind, x, part)
        for loop in (part,) if part else cpp.loops_of(format, x):
            spec = KernelSpec.on(target, format, loop, dtype, x)
            found.append(Text(spec, family.text(spec)))
    except (KeyError, ValueError, PackError) as error:
        _log.info("no kernel for %s with x in %s: %s", format, dtype, error)
        return []
    return found


def compile_all(texts: list[Text], cache: Path) -> None:
    """Compile side by side what will be needed one by one; failures are met again, and told, at use."""
    try:
        failed = build.compile_all([t.spec for t in texts], cache)
    except NoCompiler as error:  # what an earlier one made is used
        _log.info("%s", error)
        return
    for failure in failed.values():
        _log.info("%s", failure)


def direct(
    weight: torch.Tensor,
    spec: KernelSpec,
    target: Target,
    cache: Path,
    packed: Packed | None = None,
    conv: Conv | None = None,
) -> Direct:
    """One kernel on one weight, on a target that is already resolved. Raises BuildError, PackError."""
    return Direct(weight, spec.format, spec.way, target=f"cpu:{target.isa}", cache=str(cache), packed=packed, conv=conv)


@torch.no_grad()
def measure_kernel(t: Text, target: Target, machine: Rates, cache: Path) -> tuple[KernelRate, bool]:
    """The rate of one loop, and whether the machine was too busy for it to be trusted.

    Its arithmetic is that of one thread; its bandwidth, on torch's threads, a multiple of ``machine.dense_bandwidth``.
    Raises BuildError, PackError.
    """
    ms = _LOOP_MS.get(t.spec.loop, _OTHER_MS)
    calls = {"call": _try(t, target, cache, (16, _FEW, _densities(t.pattern)[-1]))[0](ms[0])}
    sizes: dict[str, tuple[int, int, int, int]] = {}
    packs: list[tuple[int, int, int]] = []
    n, k = _SMALL[::-1] if t.spec.loop == "skip" else _SMALL
    densities = _densities(t.pattern)
    # One tile: next to nothing but what is done to x.
    for rows, density in [(16, densities[-1]), *((n, density) for density in densities)]:
        call, stored, size = _try(t, target, cache, (rows, k, density))
        left = _LEFT if t.spec.loop in PARTS_OF_WEIGHT else 1.0
        packs.append((rows * k, stored, size))
        for m in ms:
            name = f"{rows}/{density}/{m}"
            calls[name] = call(m)
            sizes[name] = (k, round(rows * k * left), round(stored * left), m)
    with thread_count(1):
        seconds, busy = best_seconds(calls, budget_s=0.5, min_call_s=_LEAST_S)
    nothing = seconds.pop("call")
    taken = [(*sizes[name], max(s - nothing, 0.1 * s)) for name, s in seconds.items()]
    points = fitted(taken, positions=t.pattern.kind in ("bitmap", "index"))
    read = _bytes_of(packs[1:]) if t.values else (0.0, 0.0)
    rate = KernelRate(str(t.pattern), t.spec.way, t.spec.dtype, points, stored=read, values=t.values)
    cold, busy_too = _streamed(t, target, machine, cache)
    bandwidth, exposed = memory_of(rate, machine, cold)
    return replace(rate, bandwidth=bandwidth, exposed=exposed), busy or busy_too


@dataclass(frozen=True)
class Cold:
    """A call whose weight is in no cache: sizes, bytes read, seconds; and what dense streams beside it."""

    k: int
    positions: float
    stored: float
    read: float
    seconds: float
    dense: float  # bytes per second


def memory_of(rate: KernelRate, machine: Rates, cold: list[Cold]) -> tuple[float, tuple[tuple[float, float], ...]]:
    """(bandwidth over dense's, ``exposed``) by which calls from memory take as long as they did.

    ``rate``: its arithmetic, of one thread. The first call, which reads most, tells the bandwidth, USUALLY_EXPOSED of
    the shorter time taken for granted; with it each call tells what its own density exposes. For kernels that read a
    part of a weight all is in the bandwidth.
    """
    _, column, position, value = rate.points[0]
    works = [(column * c.k + position * c.positions + value * c.stored) / machine.scaling for c in cold]
    usual = 0.0 if rate.loop in PARTS_OF_WEIGHT else USUALLY_EXPOSED
    total, work = cold[0].seconds, works[0]
    waits = total - usual * work if total >= (1 + usual) * work else (total - work) / max(usual, 0.1)
    per_byte = max(waits / cold[0].read, 1 / (FASTEST * machine.bandwidth))
    bandwidth = 1 / per_byte / cold[0].dense
    if not usual:
        return bandwidth, ()
    found = []
    for c, work in zip(cold, works, strict=True):
        short, long = sorted((per_byte * c.read, work))
        share = (c.seconds - long) / short if short > 0 else 0.0
        found.append((c.stored / c.positions, min(max(share, 0.0), MOST_EXPOSED)))
    return bandwidth, tuple(sorted(found))


def _try(
    t: Text, target: Target, cache: Path, size: tuple[int, int, float]
) -> tuple[Callable[[int], Callable[[], object]], int, int]:
    """For a weight of ``size`` (N, K, density): M -> a call, how many values it stores, and bytes of its pack."""
    n, k, density = size
    weight, stored = sample(t.pattern, n, k, density, t.values)
    run = direct(weight.to(TORCH[t.spec.dtype]), t.spec, target, cache)

    def call(m: int) -> Callable[[], object]:
        return partial(run, torch.randn(m, k).to(TORCH[t.spec.dtype]), *_parts(t, n, k)[0])

    return call, stored, run.packed.bytes


def _parts(t: Text, n: int, k: int) -> list[tuple[torch.Tensor, ...]]:
    """What calls are given besides x: for kernels that read a part of the weight, which columns or rows, spread at
    random; _LEFT of them each, and all of them in turn, so that each call's are in no cache. Nothing for others."""
    if t.spec.loop not in PARTS_OF_WEIGHT:
        return [()]
    size = k if t.spec.loop == "skip" else n
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return [(part.sort().values,) for part in order.tensor_split(max(min(round(1 / _LEFT), size), 1))]


def _bytes_of(packs: list[tuple[int, int, int]]) -> tuple[float, float]:
    """Bytes of a position and of a value, from packs of (positions, values, bytes); one pack tells the latter."""
    position, value = fit([(a if len(packs) > 1 else 0.0, b, float(size)) for a, b, size in packs])
    return position, value


def _densities(pattern: Pattern) -> tuple[float, ...]:
    if pattern.kind == "panel":
        return (1.0,)
    return (pattern.params[0] / pattern.params[1],) if pattern.kind == "nm" else _DENSITIES


def _streamed(t: Text, target: Target, machine: Rates, cache: Path) -> tuple[list[Cold], bool]:
    """Calls whose weights are in no cache, beside those of a dense fp32 linear at the same time."""
    cold, m = cold_bytes(target), _LOOP_MS.get(t.spec.loop, _OTHER_MS)[0]
    x = torch.randn(m, _LARGE[1]).to(TORCH[t.spec.dtype])
    parts = _parts(t, *_LARGE)
    calls: dict[str, Callable[[], object]] = {}
    found = {}
    for density in _densities(t.pattern)[: 1 if t.spec.loop in PARTS_OF_WEIGHT else 2]:
        sampled, stored = sample(t.pattern, *_LARGE, density, t.values)
        weight = sampled.to(TORCH[t.spec.dtype])
        first = direct(weight, t.spec, target, cache)
        size = first.packed.bytes or weight.nbytes  # no pack: the kernel reads the weight itself
        copies = max(2, -(-cold // max(size, 1)))
        weights = beside(weight, copies) if not first.packed.bytes else [weight] * copies
        packs = packs_beside(first.packed, copies)
        runs = [direct(w, t.spec, target, cache, packed) for w, packed in zip(weights, packs, strict=True)]
        turns = [(run, p) for p in parts for run in runs]
        random.Random(0).shuffle(turns)  # what is prefetched behind the end of a pack is not the one that comes next
        calls[str(density)] = partial(_call_next, itertools.cycle(turns), x)
        share = 1 / len(parts)
        found[str(density)] = (_LARGE[1], _LARGE[0] * _LARGE[1] * share, stored * share, size * share)
    calls["dense"] = partial(cold_linear(torch.float32, SIDE, cold), torch.randn(1, SIDE))
    seconds, _, busy = best_seconds_alone_too(calls, budget_s=0.6)
    dense = 4 * SIDE * SIDE / max(seconds["dense"] - machine.dense_overhead, 1e-9)
    overhead = machine.overhead
    return [Cold(*sizes, max(seconds[d] - overhead, 0.1 * seconds[d]), dense) for d, sizes in found.items()], busy


def copied(packed: Packed) -> Packed:
    """The same pack at another place, in pages as large."""
    tensors = tuple(tensor.clone() for tensor in packed.tensors)
    in_large_pages(tensors)
    return replace(packed, tensors=tensors)


def packs_beside(packed: Packed, count: int) -> list[Packed]:
    """Copies of a pack whose tensors lie in pages of 2 MiB however small they are, as those of large layers do."""
    rows = [beside(tensor, count) for tensor in packed.tensors]
    return [replace(packed, tensors=tuple(row[i] for row in rows)) for i in range(count)]


def beside(tensor: torch.Tensor, count: int) -> list[torch.Tensor]:
    """Copies of a contiguous tensor one behind the other, each at a multiple of 64 bytes."""
    size = -(-max(tensor.nbytes, 1) // 64) * 64
    memory = torch.empty(count * size, dtype=torch.uint8)
    in_large_pages([memory])
    places = memory.view(count, size)[:, : tensor.nbytes]
    copies = [place.view(tensor.dtype).view(tensor.shape) for place in places]
    for copy in copies:
        copy.copy_(tensor)
    return copies


def _call_next(turns: Iterator[tuple[Direct, tuple[torch.Tensor, ...]]], x: torch.Tensor) -> torch.Tensor:
    run, part = next(turns)
    return run(x, *part)


def sample(pattern: Pattern, n: int, k: int, density: float, values: str = "") -> tuple[torch.Tensor, int]:
    """A random weight [n, k] (fp32) that holds ``pattern``, and how many values a format of it stores.

    ``values``: the type that the kept values lie on the grid of, exactly in bf16 too; empty: any.
    """
    generator = torch.Generator().manual_seed(0)
    kept = _on_grid(torch.rand(n, k, generator=generator) + 0.5, values)
    if pattern.kind == "nm":
        keep, of = pattern.params
        scores = torch.rand(n, -(-k // of), of, generator=generator)
        mask = torch.zeros_like(scores).scatter_(2, scores.topk(keep, dim=2).indices, 1.0)
        return kept * mask.reshape(n, -1)[:, :k], n * -(-k // of) * keep
    rows, cols = pattern.params or (1, 1)
    coarse = torch.rand(-(-n // rows), -(-k // cols), generator=generator) < density
    mask = coarse.repeat_interleave(rows, 0).repeat_interleave(cols, 1)[:n, :k]
    return kept * mask, int(coarse.sum()) * rows * cols


def _on_grid(weight: torch.Tensor, values: str) -> torch.Tensor:
    """Numbers of 0.5 to 1.5 rounded to what quantised values can be: never zero, and at most 1."""
    books = {name: min(most - 1, 7) for name, most in BOOKS.items()}
    steps = {"int8": 127, "int4": 7, "ternary": 1, **books}.get(value_kind(values)[0])
    return weight if steps is None else (weight * steps).round().clamp(1, steps) / (steps + 1)


def fitted(
    measured: list[tuple[int, int, int, int, float]], positions: bool = True
) -> tuple[tuple[int, float, float, float], ...]:
    """``KernelRate.points`` of what was measured: (K, N*K, stored, M, seconds).

    Spikes are taken out of each weight's times over M first. ``positions`` False leaves out the term in N*K, which one
    density cannot tell from that in stored values.
    """
    weights: dict[tuple[int, int, int], list[tuple[int, float]]] = {}
    for *weight, m, seconds in sorted(measured):
        weights.setdefault((weight[0], weight[1], weight[2]), []).append((m, seconds))
    at: dict[int, list[tuple[float, ...]]] = {}
    for (k, whole, stored), times in weights.items():
        for m, seconds in plausible(times):
            at.setdefault(m, []).append((k, whole if positions else 0, stored, seconds))
    points = []
    for m, found in sorted(at.items()):
        column, position, nonzero = fit(found)
        points.append((m, column, position, nonzero))
    return tuple(points)


def fit(points: list[tuple[float, ...]]) -> list[float]:
    """Coefficients, none negative, with the smallest relative error on rows of (one number each, seconds)."""
    table = torch.tensor(points, dtype=torch.float64)
    scaled = table[:, :-1] / table[:, -1:]
    count = scaled.shape[1]
    best, found = math.inf, torch.zeros(count, dtype=torch.float64)
    # Few unknowns have few sets of non-zero ones: trying all is the whole of non-negative least squares.
    for size in range(1, count + 1):
        for chosen in map(list, itertools.combinations(range(count), size)):
            part = scaled[:, chosen]
            solved = torch.linalg.lstsq(part, torch.ones(len(points), 1, dtype=torch.float64), driver="gelsd").solution
            error = float((part @ solved - 1).square().sum())
            if bool((solved < 0).any()) or not error < best - 1e-12:
                continue
            best, found = error, torch.zeros(count, dtype=torch.float64)
            found[chosen] = solved[:, 0]
    result: list[float] = found.tolist()
    return result
