"""``sparsec.tune``: a model and its inputs in, every decision measured on this machine, a summary out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsec import targets
from sparsec.cache import unwritable, wanted_dir
from sparsec.errors import SparsecError, TuningNotKept
from sparsec.options import Options
from sparsec.records import LayerRecord
from sparsec.tune import Session, tuning
from sparsec.tune_db import Database


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
    Stopped in between, the same call goes on where it was. Raises OptionError, and TuningNotKept where measurements
    cannot be written.
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
    return watched(model, args, kwargs, options, on_point)[0]


def watched(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    on_point: Callable[[int], None] | None = None,
) -> tuple[TuneSummary, Session]:
    """``tune_with``, and the session with every record that was measured or reused."""
    from sparsec.pipeline import inspect, placed  # the pipeline itself measures through ``sparsec.tune``

    options = placed(options, model)
    policy = options.policy
    if why := unwritable(place := wanted_dir(policy.cache_dir)):  # tuning is for later processes
        raise TuningNotKept(path=str(place), why=why)
    started = time.perf_counter()
    with tuning(policy.tune_budget_s, on_point, strict=True) as session, torch.no_grad():
        try:
            records = inspect(model, args, kwargs, options)
        except Exception as error:  # torch wraps what a backend raises
            inner = getattr(error, "inner_exception", None)
            if isinstance(inner, SparsecError):
                raise inner from None
            raise
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
        database=str(Database.of(policy.cache_dir).path),
    ), session


def _tuned(layer: LayerRecord) -> TunedLayer:
    m = math.prod(size if isinstance(size, int) else 0 for size in layer.site.x_shape[:-1])
    ran = layer.decision.at(max(m, 1))
    measured = layer.decision.source in ("measured", "forced") and ran.format != "dense" and ran.ours_s
    return TunedLayer(
        layer.name, (layer.fact.n, layer.fact.k), m, ran.format, ran.dense_s / ran.ours_s if measured else 0.0,
        layer.decision.reason,
    )  # fmt: skip
