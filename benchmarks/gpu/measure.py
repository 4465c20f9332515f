"""One row measured: what can compute it is made, checked against fp32, searched, and timed in turn with dense.

In: a ``Row``. Out: a dict for JSON. Whatever a library or a kernel raises becomes a sentence in ``notes``; a result
that is wrong is never timed. ``Session`` keeps what rows share: weights, packs, compiled dense products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.gpu import contenders
from benchmarks.gpu.contenders import FP8, GATE, Contender, Pack
from benchmarks.gpu.rows import REGIMES, Row, Target, verdict
from sparsec.codegen.triton.quantize import by_torch
from sparsec.codegen.triton.samples import named_weight
from sparsec.errors import SparsecError
from sparsec.formats import Format
from sparsec.grid import E4M3_MAX
from sparsec.timing import Samples, speedup
from sparsec.timing_gpu import GraphTimer, Timer, alternate, calls_of

SAMPLE_ROWS = 1024  # of a weight are random, the rest repeats them: making values on the host would take the time
WRONG = 2e-2  # relative error (of norms) beyond which a result counts as wrong; bf16 alone gives a few 1e-3
SEARCH_ROUNDS, ROUNDS = 7, 31
LAPS_S = 3.0  # of a row's timing; a round of the largest prefill takes half a second
KEEP_BYTES = 24 << 30  # of weights and packs from one row to the next


class DeviceLost(Exception):
    """The GPU no longer answers in this process, after a kernel that reached outside of its memory."""


@dataclass
class Session:
    """``step``: told what is tried next. ``inductor_s``: seconds that compiling dense products may still take."""

    device: torch.device
    l2: int
    capability: int
    copy_rate: float
    timer: Timer = field(default_factory=GraphTimer)
    configs: int = 3
    inductor_s: float = 0.0
    step: Callable[[str], None] = lambda what: None
    weights: dict[tuple[str, int, int], torch.Tensor] = field(default_factory=dict)
    packs: dict[tuple[str, int, int, str], Pack] = field(default_factory=dict)
    compiled: dict[tuple[int, int, int], Any] = field(default_factory=dict)

    def weight(self, row: Row) -> torch.Tensor:
        key = (row.regime, *row.shape)
        if key not in self.weights:
            self._make_room()
            regime = REGIMES[row.regime]
            made = named_weight(regime.weight, *row.shape, regime.density, drawn=SAMPLE_ROWS)
            self.weights[key] = made.to(self.device)
        return self.weights[key]

    def pack(self, row: Row, name: str, kind: str) -> Pack:
        key = (row.regime, *row.shape, f"{name} {kind}")
        if key not in self.packs:
            self.packs[key] = contenders.pack(kind, Format.parse(name), self.weight(row))
        return self.packs[key]

    def _make_room(self) -> None:
        held = sum(2 * w.numel() for w in self.weights.values()) + sum(p.packed.bytes for p in self.packs.values())
        if held > KEEP_BYTES:
            self.weights.clear()
            self.packs.clear()


def measure(row: Row, session: Session, skip: tuple[str, ...] = ()) -> dict[str, Any]:
    """Measure a row; ``skip``: names of contenders that took the device down. Raises DeviceLost."""
    started, notes = time.perf_counter(), [f"{name}: not tried again" for name in skip]
    weight, x = session.weight(row), inputs(row, session)
    plain = torch.where(x.abs() > GATE, x, 0) if REGIMES[row.regime].kind == "gated" else x
    read = wanted(row, x).any(0) if REGIMES[row.regime].kind == "chosen" else torch.ones_like(weight[:, 0]) > 0
    expected = (plain.float() @ weight.float().T)[:, read]
    ready: dict[str, Any] = {}
    about: dict[str, dict[str, Any]] = {}
    ours, peers = [], {}
    for kind, made in _made(row, session, weight, x, plain, notes, skip):
        session.step(made.name)
        try:
            about[made.name] = checked(made, expected, read)
            ready[made.name] = session.timer.prepare(made.call, calls_of(made.copies))
        except Exception as error:  # whatever Triton, CUDA or a library raises: the others are measured
            about.pop(made.name, None)
            notes.append(sentence(made.name, error))
            _alive(session.device, made.name)
            continue
        if kind == "ours":
            ours.append(made.name)
        else:
            peers[made.name] = kind
    session.step("timing")
    best, samples = _timed(ready, ours, peers)
    row_found = _found(row, best, samples, peers, about, session, x)
    return row_found | {"notes": notes, "seconds": round(time.perf_counter() - started, 2)}


def inputs(row: Row, session: Session) -> torch.Tensor:
    generator = torch.Generator(session.device).manual_seed(row.m)
    x = torch.rand(row.m, row.k, generator=generator, device=session.device) * 2 - 1
    if (
        REGIMES[row.regime].weight == FP8
    ):  # what rounding to e4m3 leaves alone: bits lost there are no error of a kernel
        codes, _ = by_torch(x)
        codes[:, 0] = E4M3_MAX
        x = codes.float() / 512
    return x.to(session.weight(row).dtype)


def sentence(name: str, error: BaseException) -> str:
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{name}: {said if isinstance(error, SparsecError) else f'{type(error).__name__}: {said}'}"[:400]


def wanted(row: Row, x: torch.Tensor) -> torch.Tensor:
    """Half of the outputs of each row of x, as ones of [M, N] among zeros."""
    generator = torch.Generator(x.device).manual_seed(row.m + 1)
    return (torch.rand(row.m, row.n, generator=generator, device=x.device) > GATE).to(x.dtype)


def checked(made: Contender, expected: torch.Tensor, read: torch.Tensor) -> dict[str, Any]:
    """Errors against fp32 in the outputs that are ``read`` [N], and whether a second run gives the same bits.

    Raises ValueError for a wrong result."""
    first, second = made.call(0)[:, read], made.call(0)[:, read]
    off = first.float() - expected
    relative = float(off.norm() / expected.norm().clamp(min=1e-30))
    if not relative <= WRONG:  # NaN too
        raise ValueError(f"its result is wrong: relative error {relative:.3g}")
    return {
        "bytes": made.bytes, "copies": made.copies, "pack_s": round(made.pack_s, 4), "config": dict(made.config),
        "max_error": float(off.abs().max()), "relative_error": relative, "same_bits": torch.equal(first, second),
    }  # fmt: skip


def _alive(device: torch.device, name: str) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLost(sentence(name, error)) from error


def _made(
    row: Row, session: Session, weight: torch.Tensor, x: torch.Tensor, plain: torch.Tensor,
    notes: list[str], skip: tuple[str, ...],
) -> Iterator[tuple[str, Contender]]:  # fmt: skip
    """("dense", a peer's name or "ours", contender). What cannot be made leaves a sentence in ``notes``."""
    cold = contenders.clones(weight, session.l2)
    yield "dense", contenders.cublas(cold, plain)
    regime = REGIMES[row.regime]
    sources: list[tuple[str, str, Callable[[], Iterator[Contender]]]] = [
        ("dense", "Inductor", lambda: _one(_inductor(row, session, cold, plain)))
    ]
    if regime.weight == FP8:
        sources.append(("dense", "scaled_mm fp8", lambda: _one(contenders.scaled_mm(cold, x))))
    for peer in regime.peers:
        if peer == "cuSPARSELt fp8":
            sources.append((peer, peer, lambda: _one(contenders.cusparselt_fp8(cold, x, session.capability))))
        elif peer == "cuSPARSELt":
            sources.append((peer, peer, lambda: _one(contenders.cusparselt(cold, x))))
        elif peer == "torch BSR":
            sides = Format.parse(regime.weight).pattern.params
            block = (int(sides[0]), int(sides[1]))
            sources.append((peer, peer, lambda block=block: _one(contenders.torch_bsr(cold, x, block))))  # type: ignore[misc]
        else:
            sources.append((peer, peer, lambda peer=peer: _kernels(row, session, peer, x)))  # type: ignore[misc]
    for name in regime.formats:
        sources.append(("ours", name, lambda name=name: _kernels(row, session, name, x)))  # type: ignore[misc]
    for kind, name, make in sources:
        session.step(name)
        try:
            found = [c for c in make() if c.name not in skip and name not in skip]
        except Exception as error:  # as above
            notes.append(sentence(name, error))
            _alive(session.device, name)
            continue
        yield from ((kind, contender) for contender in found)


def _one(contender: Contender) -> Iterator[Contender]:
    yield contender


def _kernels(row: Row, session: Session, name: str, x: torch.Tensor) -> Iterator[Contender]:
    """Kernels of every family that packs the format. Raises LookupError where none takes as many rows of x."""
    only = REGIMES[row.regime].kind
    kinds, found, refused = (only,) if only else contenders.kinds_of(Format.parse(name), row.m), 0, []
    needed = wanted(row, x) if only == "chosen" else None
    for kind in kinds:
        try:
            made = session.pack(row, name, kind)
        except SparsecError as error:
            refused.append(str(error))
            continue
        for contender in contenders.kernels(made, x, session.l2, session.capability, session.configs, needed):
            found += 1
            yield contender
    if not found:
        raise LookupError(refused[0] if refused else "no kernel takes so many rows" if kinds else "no family packs it")


def _inductor(row: Row, session: Session, cold: list[torch.Tensor], x: torch.Tensor) -> Contender:
    """Max-autotune, compiled once for a shape, while its share of the time lasts. Raises TimeoutError after that."""
    key = (row.n, row.k, row.m)
    if key not in session.compiled:
        if session.inductor_s <= 0:
            raise TimeoutError("its share of the time is used up, so cuBLAS alone is the dense product of this row")
        session.step("Inductor max-autotune")
        started = time.perf_counter()
        function = contenders.compiled_linear(f"linear_{row.n}_{row.k}_{row.m}")
        try:
            function(x, cold[0])
            session.compiled[key] = function
        finally:
            session.inductor_s -= time.perf_counter() - started
    return contenders.inductor(session.compiled[key], cold, x)


def _timed(ready: dict[str, Any], ours: list[str], peers: dict[str, str]) -> tuple[str, dict[str, Samples]]:
    """The fastest of ours by a short search, then it against all others in turn."""
    best = ""
    if ours:
        found = alternate({name: ready[name] for name in ours}, SEARCH_ROUNDS, LAPS_S / 2)
        best = min(found, key=lambda name: found[name].median)
    chosen = {name: ready[name] for name in (*peers, best) if name}
    return best, alternate(chosen, ROUNDS, LAPS_S)


def _found(
    row: Row, best: str, samples: dict[str, Samples], peers: dict[str, str], about: dict[str, dict[str, Any]],
    session: Session, x: torch.Tensor,
) -> dict[str, Any]:  # fmt: skip
    """What a row's JSON line holds, besides ``notes`` and ``seconds``."""
    dense = min((n for n in samples if peers.get(n) == "dense"), key=lambda n: samples[n].median, default="")
    rivals = {"dense": dense}
    for name, kind in peers.items():
        if kind != "dense" and name in samples and samples[name].median < _median(samples, rivals.get(kind, "")):
            rivals[kind] = name
    ratios = {}
    if best:
        for than, name in rivals.items():
            if name:
                found = speedup(samples[name], samples[best])
                ratios[than] = [found.value, found.low, found.high]
    moved = 2 * (x.numel() + row.m * row.n)
    engines = {}
    for name, taken in samples.items():
        rate = (about[name]["bytes"] + moved) / taken.median
        engines[name] = about[name] | {
            "us": 1e6 * taken.median, "us_low": 1e6 * taken.quantile(0.05), "us_high": 1e6 * taken.quantile(0.95),
            "tb_s": rate / 1e12, "of_copy": rate / session.copy_rate if session.copy_rate else None,
            "rounds": len(taken.seconds),
        }  # fmt: skip
    return {
        "name": row.name, "regime": row.regime, "n": row.n, "k": row.k, "m": row.m, "best": best, "dense": dense,
        "ratios": ratios, "engines": engines, "targets": [_judged(t, ratios, samples, best) for t in row.targets],
    }  # fmt: skip


def _median(samples: dict[str, Samples], name: str) -> float:
    return samples[name].median if name in samples else float("inf")


def _judged(target: Target, ratios: dict[str, list[float]], samples: dict[str, Samples], best: str) -> dict[str, Any]:
    ratio = ratios.get(target.than, [None])[0]
    if target.fixed_us and best:
        ratio = target.fixed_us / (1e6 * samples[best].median)
    said = {"than": target.than, "must": target.must, "stretch": target.stretch}
    return said | {"ratio": ratio, "verdict": verdict(target, ratio)}
