"""The first five minutes: a pruned real encoder and a wide LLM-shaped stack, against Inductor on this machine.

In: ``Settings``. Out: a JSON-able dict with every number that ``demo_report`` prints, plots and writes. Both engines
run in one process on torch's own threads and take turns call by call, so that noise hits both alike.
"""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsec
from sparsec.demo_models import (
    Case,
    cosine,
    load_encoder,
    mean_pooled,
    repeat_first_block,
    wide_case,
    wide_stack,
)
from sparsec.errors import InputError, SparsecError, SparsecWarning
from sparsec.records import CompileRecord, recording
from sparsec.timing import interleave, speedup

COMPILE_TICKS = 20  # a compilation takes about as long as this many rounds; only the progress bar uses it
EXPLAIN_AT = 0.8


@dataclass(frozen=True)
class Settings:
    """What to run. ``backend`` is what is compared with Inductor; ``model`` is ``minilm`` or a local folder."""

    model: str = "minilm"
    encoder: bool = True
    wide: bool = True
    sparsities: tuple[float, ...] = (0.0, 0.5, 0.7, 0.8, 0.9)
    cases: int = 3
    blocks: int = 4
    hidden: int = 4096
    inner: int = 11008
    rounds: int = 60
    budget_s: float = 4.0
    options: Mapping[str, Any] = field(default_factory=dict)
    backend: str = "sparsec"

    @classmethod
    def quick(cls, **chosen: Any) -> Settings:
        """Under 90 seconds: fewer densities and shapes, one wide block."""
        return cls(**{"sparsities": (0.0, 0.8, 0.9), "cases": 1, "blocks": 1, "budget_s": 2.0, **chosen})


@dataclass
class Progress:
    """Counts ticks towards a total; ``step(done, total, what)`` is called for each."""

    total: int
    step: Callable[[int, int, str], None]
    done: int = 0
    what: str = ""

    def advance(self, ticks: int = 1, what: str = "") -> None:
        self.what = what or self.what
        self.done = min(self.done + ticks, self.total)
        self.step(self.done, self.total, self.what)


@dataclass(frozen=True)
class Engine:
    """A compiled model, or the model itself where ``note`` says why it could not be compiled."""

    run: Callable[..., Any]
    note: str = ""


def run_demo(
    settings: Settings, step: Callable[[int, int, str], None] = lambda done, total, what: None
) -> dict[str, Any]:
    """Run both halves. Raises ModelNotFound or BadModelFile for a ``model`` that cannot be used."""
    started = time.perf_counter()
    halves = settings.encoder * settings.cases + settings.wide
    progress = Progress((settings.rounds + 2 * COMPILE_TICKS) * len(settings.sparsities) * halves, step)
    report: dict[str, Any] = {"version": 1, "model": settings.model, "environment": environment(settings), "notes": []}
    with collected_warnings(report["notes"]), torch.inference_mode():
        if settings.encoder:
            report["encoder"] = encoder_half(settings, progress)
        if settings.wide:
            report["wide"] = wide_half(settings, progress)
    report["seconds"] = time.perf_counter() - started
    return report


def environment(settings: Settings) -> dict[str, Any]:
    return {
        "sparsec": sparsec.__version__,
        "torch": torch.__version__,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backend": settings.backend,
        "options": dict(settings.options),
    }


@contextmanager
def collected_warnings(notes: list[str]) -> Iterator[None]:
    """Warnings of sparsec become notes of the report: each sentence once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SparsecWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, SparsecWarning) and str(warning.message) not in notes:
            notes.append(str(warning.message))


def encoder_half(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Latency of an encoder at each sparsity and shape, and what pruning and compiling did to its embeddings."""
    try:
        encoder = load_encoder(settings.model)
    except InputError as error:
        if settings.model != "minilm":
            raise
        return {"skipped": str(error)}
    model, every_case = encoder.model, encoder.cases()
    cases, sentences = every_case[: settings.cases], every_case[-1].inputs  # the last holds all sentences
    dense = mean_pooled(model, sentences)
    half: dict[str, Any] = {"model": f"{settings.model}, {encoder.loaded.dtype}", "rows": [], "quality": []}
    for sparsity in settings.sparsities:
        prune(model, sparsity)
        for i, case in enumerate(cases):
            row, ours = compare(model, case, sparsity, settings, progress)
            half["rows"].append(row)
            if i == 0:
                found, masked = mean_pooled(ours.run, sentences), mean_pooled(model, sentences)
                quality = {"to_dense": cosine(found, dense), "to_masked": cosine(found, masked)}
                half["quality"].append({"sparsity": sparsity, **quality})
        if sparsity == explained_at(settings):
            half["explain"] = explained(model, cases[0], sparsity, settings)
    return half


def wide_half(settings: Settings, progress: Progress) -> dict[str, Any]:
    """Decode of one token through wide blocks: here weights do not fit a cache, and zeros save memory traffic."""
    model = wide_stack(settings.blocks, settings.hidden, settings.inner)
    case = wide_case(settings.hidden)
    blocks = f"{settings.blocks} block{'s' * (settings.blocks > 1)}"
    shape = f"{blocks} of {settings.hidden}/{settings.inner}, bf16, random weights"
    half: dict[str, Any] = {"model": shape, "rows": [], "quality": []}
    for sparsity in settings.sparsities:
        prune(model[0], sparsity)
        repeat_first_block(model)
        row, ours = compare(model, case, sparsity, settings, progress)
        half["rows"].append(row)
        found, masked = ours.run(**case.inputs)[0].float(), model(**case.inputs)[0].float()
        half["quality"].append({"sparsity": sparsity, "to_masked": cosine(found, masked)})
        if sparsity == explained_at(settings):
            half["explain"] = explained(model, case, sparsity, settings)
    return half


def prune(model: nn.Module, sparsity: float) -> None:
    """Magnitude masks nest: pruning the 70 % model to 80 % gives the masks of the dense one, without a copy of it."""
    if sparsity > 0:
        sparsec.sparsify(model, {"method": "magnitude", "sparsity": sparsity}, progress=False)


def explained_at(settings: Settings) -> float:
    return EXPLAIN_AT if EXPLAIN_AT in settings.sparsities else settings.sparsities[-1]


def compare(
    model: nn.Module, case: Case, sparsity: float, settings: Settings, progress: Progress
) -> tuple[dict[str, Any], Engine]:
    """One row: milliseconds of both engines, their ratio with its interval, and the path sparsec took."""
    torch.compiler.reset()  # else the graphs of the previous density stay in the cache of this class
    progress.advance(0, f"{sparsity:.0%} zeros, {case.name}: compiling")
    base = compiled(model, case, "inductor", {})
    progress.advance(COMPILE_TICKS)
    with recording() as records:
        ours = compiled(model, case, settings.backend, settings.options)
    progress.advance(COMPILE_TICKS, f"{sparsity:.0%} zeros, {case.name}: timing")
    before = progress.done
    times = interleave(
        {"inductor": lambda: base.run(**case.inputs), "ours": lambda: ours.run(**case.inputs)},
        rounds=settings.rounds,
        budget_s=settings.budget_s,
        on_round=lambda done, total: progress.advance(),
    )
    progress.advance(settings.rounds - (progress.done - before))
    ratio = speedup(times["inductor"], times["ours"])
    row = {
        "case": case.name,
        "sparsity": sparsity,
        "zeros": share_of_zeros(model),
        **{f"{name}_ms": in_ms(samples) for name, samples in times.items()},
        "ratio": {"value": ratio.value, "low": ratio.low, "high": ratio.high},
        "path": path_taken(records, case.rows),
        "notes": sorted({engine.note for engine in (base, ours) if engine.note} | {r.failure for r in records} - {""}),
    }
    return row, ours


def compiled(model: nn.Module, case: Case, backend: str, options: Mapping[str, Any]) -> Engine:
    """The compiled model, warm. Where nothing can be compiled (no C++ compiler), the model itself and the reason."""
    chosen: dict[str, Any] = {"options": dict(options)} if options else {}
    try:
        run = torch.compile(model, backend=backend, dynamic=False, **chosen)
        run(**case.inputs)
        return Engine(run)
    except SparsecError:
        raise
    except Exception as error:
        why = next((line for line in reversed(str(error).splitlines()) if "compiler" in line.lower()), str(error))
        reason = why.strip().splitlines()[0] if why.strip() else type(error).__name__
        return Engine(model, f"{backend} could not compile, so the model ran dense without it: {reason}")


def share_of_zeros(model: nn.Module) -> float:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    return 1.0 - sum(int(w.count_nonzero()) for w in weights) / max(sum(w.numel() for w in weights), 1)


def in_ms(samples: Any) -> dict[str, float]:
    return {"best": samples.best * 1e3, "median": samples.median * 1e3, "p90": samples.quantile(0.9) * 1e3}


def path_taken(records: list[CompileRecord], rows: int) -> str:
    """``"36 bitmap+fp32, 1 dense"``: how many layers run which format at this shape."""
    chosen: Counter[str] = Counter()
    for record in records:
        for layer in record.layers:
            leading = layer.site.x_shape[:-1]
            m = prod(d for d in leading if isinstance(d, int)) if leading else rows
            chosen[layer.decision.at(max(m, 1)).format] += 1
    return ", ".join(f"{count} {name}" for name, count in chosen.most_common()) or "not compiled by sparsec"


def explained(model: nn.Module, case: Case, sparsity: float, settings: Settings) -> dict[str, Any]:
    """The explain table of this model as text and as data."""
    torch.compiler.reset()
    try:
        explanation = sparsec.explain(model, options=dict(settings.options) or None, **case.inputs)
    except SparsecError as error:
        return {"sparsity": sparsity, "case": case.name, "text": str(error), "data": {}}
    return {"sparsity": sparsity, "case": case.name, "text": str(explanation), "data": explanation.to_dict()}


def report_folder(chosen: Path) -> Path:
    """Create the folder of the report. Raises OSError, which the command turns into one sentence."""
    chosen.mkdir(parents=True, exist_ok=True)
    if not os.access(chosen, os.W_OK):
        raise PermissionError(13, "cannot be written", str(chosen))
    return chosen
