"""Tuning on a CPU: one weight in, seconds of dense and of each sparse kernel out, interleaved.

Each candidate runs beside dense ``F.linear`` (what Inductor calls for a linear) on copies of the weight used in turn,
so that, as inside a model, no call finds its weight in a cache.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from sparsec.cache import cache_dir, digest
from sparsec.codegen.spec import Packed
from sparsec.efforts import Effort
from sparsec.errors import BuildError, PackError
from sparsec.facts import Conv, WeightFact
from sparsec.formats import Format
from sparsec.measure import rates_for
from sparsec.measure_calls import cold_bytes, tune_log
from sparsec.measure_conv import image
from sparsec.measure_kernels import TORCH, Text, copied, direct, kernel_texts
from sparsec.options import Policy
from sparsec.passes.decide import Gates
from sparsec.passes.decide.candidates import PARTS_OF_WEIGHT
from sparsec.passes.decide.conv import conv_rates
from sparsec.quiet import others_s, short_of_cores, wait_for_cores
from sparsec.runtime.direct import convolve
from sparsec.targets.base import Target
from sparsec.timing import interleave
from sparsec.tune_point import Timed, Trial, left_at_random, part_name, promising, promising_parts
from sparsec.tune_record import Key

_COLD_FROM = 2**17  # bytes of dense weight; a smaller one is measured where it is, its time is the call's
_log = tune_log()


@dataclass(frozen=True)
class CpuPoint:
    """One weight [N, K] on this CPU: which ways to measure, and their seconds."""

    weight: torch.Tensor
    fact: WeightFact
    dtype: str
    target: Target
    policy: Policy
    threads: int
    x: str = ""  # "int8": the graph rounds x to it
    conv: Conv | None = None  # of a convolution, whose images are what is timed
    gates: Gates = ()  # loops that read a part of the weight, and the share that is left

    def trials(self, m: int, effort: Effort) -> dict[Key, Trial]:
        """The sparse ways worth measuring at M = ``m``, cheapest by the model first."""
        cache = cache_dir(self.policy.cache_dir)
        said = cache, self.policy.formats, self.x, tuple(loop for loop, _ in self.gates)
        rates = conv_rates(rates_for(self.fact, self.dtype, self.target, self.threads, *said), self.conv)
        found: dict[Key, Trial] = {}
        for way, trial in promising(self.fact, self.dtype, rates, self.policy, m, effort, self.x):
            walk = self._walk(m)
            said_loop = f"{way.kernel}@{walk}" if walk else way.kernel
            if (text := self._text(Format.parse(way.format), way.kernel)) is not None:
                found[self._key(text, said_loop, m)] = replace(trial, run=text)
        parts = promising_parts(self.fact, self.dtype, rates, self.policy, m, effort, self.gates)
        for format, loop, trial in parts:
            if (text := self._text(format, loop)) is not None:
                found[self._key(text, part_name(loop, trial.left), m)] = replace(trial, run=text)
        return found

    def _text(self, format: Format, loop: str) -> Text | None:
        said = loop if loop in PARTS_OF_WEIGHT else loop.partition("/")[2]
        texts = kernel_texts(format, self.dtype, self.target, said)
        return next((t for t in texts if t.spec.way == loop), None)

    def _key(self, text: Text, loop: str, m: int) -> Key:
        fact = self.fact
        return Key(
            self.target.fingerprint, torch.__version__, self.threads, digest(text.text), str(text.spec.format), loop,
            self.dtype, fact.n, fact.k, round(40 * fact.density), m, self._cold,
        )  # fmt: skip

    @property
    def _cold(self) -> bool:
        return self.weight.numel() * self.weight.element_size() >= _COLD_FROM

    def measure(self, trials: Mapping[Key, Trial], m: int, effort: Effort, budget_s: float) -> Timed | None:
        """Run the ways against dense in the same rounds; those that the budget leaves no time to pack are missing."""
        started = time.perf_counter()
        copies = self._copies(self.weight)
        dense = itertools.cycle(copies)
        walk = self._walk(m)
        x = self._input(m, walk)
        product = torch.nn.functional.linear if walk is None else partial(convolve, conv=walk)
        calls: dict[str, Callable[[], object]] = {}
        packs: dict[str, list[Packed]] = {}
        late: list[Key] = []
        for key, trial in trials.items():
            if calls and time.perf_counter() - started > budget_s:
                late.append(key)
                continue
            try:
                runs = self._runs(trial, packs, copies, walk)
            except (BuildError, PackError) as error:  # the decision meets it again, and records it
                _log.info("%s is not measured: %s", key.name, error)
                continue
            calls[key.id] = partial(_next_call, itertools.cycle(runs), x)
        if not calls:
            return None
        wait_for_cores(self.threads)
        left = max(budget_s - (time.perf_counter() - started), 0.0)
        taken, began = others_s(), time.monotonic()
        samples = interleave(
            {"dense": lambda: product(x, next(dense)), **calls},
            effort.rounds,
            min(effort.point_s, left),
            min_call_s=0.0 if self._cold else 2e-4,
        )
        used = 0.0 if taken is None else (others_s() or taken) - taken
        busy = short_of_cores(used, time.monotonic() - began, self.threads)
        ways = {key: samples[key.id] for key in trials if key.id in samples}
        return Timed(samples["dense"], ways, busy, tuple(late))

    def _walk(self, m: int) -> Conv | None:
        """The convolution with the images that are timed for ``m`` rows: its own, where those are known."""
        return self.conv if self.conv is None or self.conv.rows else self.conv.about(m)

    def _input(self, m: int, walk: Conv | None) -> torch.Tensor:
        if walk is not None:
            batch, high, wide = walk.image
            return image(batch, self.fact.k // math.prod(walk.kernel), high, wide, TORCH[self.dtype])
        return torch.randn(m, self.fact.k, generator=torch.Generator().manual_seed(0)).to(TORCH[self.dtype])

    def _runs(
        self, trial: Trial, packs: dict[str, list[Packed]], dense: list[torch.Tensor], walk: Conv | None
    ) -> list[Callable[[torch.Tensor], torch.Tensor]]:
        """The kernel on as many copies of the pack as it takes to outgrow the caches; loops share the copies.

        ``dense``: copies of the weight, for kernels that read it itself."""
        cache, spec, weight = cache_dir(self.policy.cache_dir), trial.run.spec, self.weight.detach()
        part = spec.loop if spec.loop in PARTS_OF_WEIGHT else ""
        name = f"{spec.format} {spec.x}{part}"
        if name not in packs:
            packed = direct(weight, spec, self.target, cache).packed
            times = len(dense) if not packed.bytes else _copies_for(packed.bytes, self.target) if self._cold else 1
            packs[name] = [packed, *(copied(packed) for _ in range(times - 1))]
        weights = [weight] * len(packs[name]) if packs[name][0].tensors else dense
        runs = [
            direct(w, spec, self.target, cache, packed, walk) for w, packed in zip(weights, packs[name], strict=True)
        ]
        return [partial(run, active=self._active(part, trial.left)) for run in runs] if part else [*runs]

    def _active(self, loop: str, left: float) -> torch.Tensor:
        """Which columns or rows are left, at random: ascending, int32."""
        size = self.fact.k if loop == "skip" else self.fact.n
        return left_at_random(left, size)

    def _copies(self, weight: torch.Tensor) -> list[torch.Tensor]:
        size = weight.numel() * weight.element_size()
        times = _copies_for(size, self.target) if self._cold else 1
        return [weight.detach(), *(weight.detach().clone() for _ in range(times - 1))]


def _copies_for(size: int, target: Target) -> int:
    return -(-cold_bytes(target) // max(size, 1))


def _next_call(runs: Iterator[Callable[[torch.Tensor], torch.Tensor]], x: torch.Tensor) -> torch.Tensor:
    return next(runs)(x)
