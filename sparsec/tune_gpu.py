"""Tuning on a GPU: one weight in, how many times faster than dense each kernel and configuration is.

The records, the statistics and the rule that dense wins ties are those of the CPU (``tune.py``); what differs is the
clock. On a GPU a call is far shorter than its launch, so dense and each kernel are captured in CUDA graphs of several
calls that walk through copies of the weight which no cache holds, and graphs are replayed in turn between events.
Without a GPU (Triton's interpreter) the host's clock stands in, so that everything but the times can be tried.

Configurations (tile sizes, splits, warps) are the families' data; one is a record of its own, ``gather@lanes=8,...``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from sparsec.cache import digest
from sparsec.codegen import triton
from sparsec.codegen.spec import Packed
from sparsec.efforts import EFFORTS, Effort
from sparsec.errors import BuildError, PackError
from sparsec.facts import Range, WeightFact
from sparsec.formats import Format
from sparsec.gpu_rates import rates_for
from sparsec.measure_calls import tune_log
from sparsec.options import Policy
from sparsec.passes.decide import Gates
from sparsec.passes.decide.gates import expected_share
from sparsec.runtime.gpu import Config, Route, product
from sparsec.targets.cuda import GpuTarget
from sparsec.timing import Samples
from sparsec.timing_gpu import GraphTimer, HostTimer, Once, Timer, alternate, calls_of, copies_of
from sparsec.tune_db import Database
from sparsec.tune_point import Timed, Trial, left_at_random, part_name, promising, promising_parts
from sparsec.tune_record import Key

_log = tune_log()


@dataclass(frozen=True)
class Run:
    """One kernel with one configuration on one pack. ``left``: the share of columns or outputs that is left."""

    packed: Packed
    loop: str
    config: Config
    left: float = 1.0

    def route(self, packed: Packed | None = None) -> Route:
        return Route(1, 2**62, packed or self.packed, self.loop, self.config)


@dataclass(frozen=True)
class GpuPoint:
    """One weight [N, K] on its GPU: which kernels to measure, and their measurement."""

    weight: torch.Tensor
    fact: WeightFact
    dtype: str
    target: GpuTarget
    policy: Policy
    gates: Gates = ()

    def trials(self, m: int, effort: Effort) -> dict[Key, Trial]:
        """Kernels worth measuring at M = ``m``, cheapest by the model first, each with its first configurations."""
        expected = rates_for(self.target, self.fact, self.policy.formats)
        found: dict[Key, Trial] = {}
        known = self.fact, self.dtype, expected, self.policy, m, effort
        ways = [(way.format, way.kernel, trial) for way, trial in promising(*known)]
        ways += [(str(format), loop, trial) for format, loop, trial in promising_parts(*known, self.gates)]
        for format, loop, trial in ways:
            try:
                packed = self._packed(format, loop)
            except (BuildError, PackError, torch.OutOfMemoryError) as error:  # the decision meets it again
                _log.info("%s is not measured: %s", format, error)
                continue
            for config in configs_of(packed, loop, m, self.target)[: effort.configs]:
                run = Run(packed, loop, config, trial.left)
                found[self.key(format, loop, config, m)] = replace(trial, run=run)
        return found

    def key(self, format: str, loop: str, config: Config, m: int) -> Key:
        said = ",".join(f"{name}={value}" for name, value in config)
        left = next((expected_share(left) for name, left in self.gates if name == loop), None)
        named = f"{loop}@{said}" if left is None else f"{part_name(loop, left)},{said}"
        fact = self.fact
        return Key(
            self.target.fingerprint, torch.__version__, 0, kernels_hash(), format, named, self.dtype,
            fact.n, fact.k, round(40 * fact.density), m, True,
        )  # fmt: skip

    def measure(self, trials: Mapping[Key, Trial], m: int, effort: Effort, budget_s: float) -> Timed | None:
        """Run the wanted kernels against dense in the same rounds."""
        x = torch.randn(m, self.fact.k, generator=torch.Generator().manual_seed(0)).to(self.weight)
        dense = self._copies(self.weight)
        calls: dict[str, Callable[[int], object]] = {"dense": _dense_call(dense, x)}
        most = len(dense)
        for key, trial in trials.items():
            run: Run = trial.run
            times = self._times(run.packed.bytes or self.weight.nbytes)
            packs = [run.packed, *(_copy(run.packed) for _ in range(times - 1))]
            calls[key.id] = _our_call(run, packs, x, self.target.capability, dense)
            most = max(most, len(packs))
        samples, late = timed(calls, most, effort.rounds, effort.point_s, budget_s, self.weight.device)
        if "dense" not in samples:
            return None
        ways = {key: samples[key.id] for key in trials if key.id in samples}
        return Timed(samples["dense"], ways, late=tuple(key for key in trials if key.id in late))

    @functools.lru_cache(maxsize=8)  # noqa: B019  a point lives as long as one weight is tuned
    def _packed(self, format: str, loop: str) -> Packed:
        return triton.pack_verified(self.weight, Format.parse(format), self.fact.key, loop)

    def _times(self, size: int) -> int:
        return copies_of(size, self.target.l2_bytes) if self.weight.is_cuda else 1

    def _copies(self, weight: torch.Tensor) -> list[torch.Tensor]:
        times = self._times(weight.numel() * weight.element_size())
        return [weight.detach(), *(weight.detach().clone() for _ in range(times - 1))]


def configs_of(packed: Packed, loop: str, m: int, target: GpuTarget) -> list[Config]:
    family = triton.family_of(packed.format, loop)
    return [tuple(sorted(c.items())) for c in family.configs(packed, loop, m, target.capability)]


@functools.cache
def kernels_hash() -> str:
    """Of the text of every GPU kernel, Triton's and CUDA's, and of the Triton that compiles it."""
    here = Path(triton.__file__).parent
    files = (f for folder in (here, here.parent / "cuda") for f in folder.iterdir() if f.suffix in (".py", ".cuh"))
    return digest(triton.need_triton(), *(f.read_bytes() for f in sorted(files)))


def tuned_configs(
    weight: torch.Tensor, fact: WeightFact, dtype: str, part: Range, packed: Packed, target: GpuTarget, policy: Policy,
    gates: Gates = (),
) -> tuple[tuple[int, Config], ...]:  # fmt: skip
    """(M bucket, fastest measured configuration) of one kernel on such weights, from the database; M ascending."""
    point = GpuPoint(weight, fact, dtype, target, policy, gates)
    found = []
    for m in EFFORTS["full"].ms:
        if m < part.m_lo or (part.m_hi is not None and m > part.m_hi):
            continue
        configs = configs_of(packed, part.kernel, m, target)[: EFFORTS["full"].configs]
        keys = {point.key(part.format, part.kernel, config, m): config for config in configs}
        known = Database.of(policy.cache_dir).load(keys)
        if known:
            best = max(known.values(), key=lambda record: record.ratio.low)
            found.append((m, keys[best.key]))
    return tuple(found)


def _copy(packed: Packed) -> Packed:
    return replace(packed, tensors=tuple(t.clone() for t in packed.tensors))


def _dense_call(copies: Sequence[torch.Tensor], x: torch.Tensor) -> Callable[[int], object]:
    return lambda i: F.linear(x, copies[i % len(copies)])


def _our_call(
    run: Run, packs: Sequence[Packed], x: torch.Tensor, capability: int, weights: Sequence[torch.Tensor]
) -> Callable[[int], object]:
    """``weights``: copies of the dense one, for kernels that read it itself."""
    routes = [run.route(packed) for packed in packs]
    if run.loop == "skip":
        x = x * kept(run.left, x.shape[1]).to(x)
    if run.loop != "select":
        return lambda i: product(routes[i % len(routes)], x, capability=capability)
    needed = kept(run.left, run.packed.shape[0]).to(x)[None]

    def call(i: int) -> object:
        weight = weights[i % len(weights)]
        return product(routes[i % len(routes)], x, capability=capability, weight=weight, needed=needed)

    return call


def kept(left: float, size: int) -> torch.Tensor:
    """Ones at a share ``left`` of ``size`` places, at random, among zeros."""
    return torch.zeros(size).index_fill(0, left_at_random(left, size).long(), 1.0)


def timed(
    calls: Mapping[str, Callable[[int], object]],
    copies: int,
    rounds: int,
    point_s: float,
    budget_s: float,
    device: torch.device,
) -> tuple[dict[str, Samples], set[str]]:
    """Seconds a call, one a round, in rotating order; each call is given its number, to choose its copy by.

    A kernel that fails is left out, with its reason in the log. The second answer: those that were not prepared, since
    compiling the others had used up ``budget_s``. Without dense nothing can be claimed: an empty answer.
    """
    timer: Timer = GraphTimer() if device.type == "cuda" else HostTimer()
    ready: dict[str, Once] = {}
    late: set[str] = set()
    started = time.perf_counter()
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for name, call in calls.items():
            if len(ready) > 1 and time.perf_counter() - started > budget_s:
                late.add(name)
                continue
            try:
                ready[name] = timer.prepare(call, calls_of(copies))
            except Exception as error:  # whatever Triton or CUDA raises, this kernel is not a candidate here
                _log.info("%s is not measured: %s", name, error)
        left = max(budget_s - (time.perf_counter() - started), 0.0)
        return (alternate(ready, rounds, min(point_s, left)) if "dense" in ready else {}), late
