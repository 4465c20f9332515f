"""A whole model by two engines in one run: what ``sparsec bench`` and ``explain(measure=True)`` both report.

In: a module, and what makes one timed call of a compiled form of it. Out: seconds of ``torch.compile`` (Inductor) and
of ``torch.compile(backend="sparsec")`` round by round, how far their outputs are apart, and what sparsec recorded. The
module is not changed, and what it was compiled to before stays compiled.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsec import compat, records
from sparsec.codegen.build import find_compiler
from sparsec.errors import NoCompiler, SparsecWarning
from sparsec.timing import Ratio, Samples, interleave, speedup

Make = Callable[[Callable[..., Any]], Callable[[], Any]]  # a model to call -> one timed call of it
Tell = Callable[[str, float], None]  # what is done now, and the share of the work that is behind

AGAIN = "the model was compiled again while it was timed, so these times hold compilation"


@dataclass(frozen=True)
class BothTimed:
    """``base``: the dense engine, ``inductor``, or ``eager`` where no compiler is found.

    ``difference``: largest difference between the two outputs, relative to the dense one's largest value. ``notes``:
    sentences about this run, among them why sparsec left a graph as it was.
    """

    base: str
    dense: Samples
    sparse: Samples
    difference: float
    seen: tuple[records.CompileRecord, ...]
    notes: tuple[str, ...]

    @property
    def ratio(self) -> Ratio:
        """How many times faster sparsec is than ``base``."""
        return speedup(self.dense, self.sparse)


def time_both(
    model: Callable[..., Any],
    make: Make,
    options: Mapping[str, Any],
    *,
    rounds: int,
    warmup: int = 2,
    budget_s: float = float("inf"),
    tell: Tell = lambda what, share: None,
) -> BothTimed:
    """Compile ``model`` with both engines, compare their outputs, time them in turns, without gradients.

    ``options``: of ``torch.compile(backend="sparsec")``. ``rounds``, ``warmup``, ``budget_s``: as for ``interleave``.
    Raises what the model and its compilation raise.
    """
    graphs = 0  # compiled up to the end of the first round

    def on_round(done: int, of: int) -> None:
        nonlocal graphs
        graphs = graphs or len(seen)
        tell("timing", 0.5 + 0.5 * done / of)

    with (
        torch.no_grad(),
        compat.looking_only(),
        records.recording() as seen,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always", SparsecWarning)
        base, dense = _dense(model)
        calls = {base: make(dense), "sparsec": make(_sparsec(model, options))}
        tell("compiling", 0.0)
        expected = _tensor(calls[base]())
        tell("compiling", 0.25)
        difference = _difference(expected, _tensor(calls["sparsec"]()))
        tell("timing", 0.5)
        samples = interleave(calls, rounds, budget_s, warmup, on_round=on_round)
    said = [str(w.message) for w in caught if issubclass(w.category, SparsecWarning)]
    said += [AGAIN] if len(seen) > graphs else []
    return BothTimed(base, samples[base], samples["sparsec"], difference, tuple(seen), notes=tuple(dict.fromkeys(said)))


def _dense(model: Callable[..., Any]) -> tuple[str, Callable[..., Any]]:
    try:
        find_compiler()
    except NoCompiler:  # Inductor's CPU code needs one too
        return "eager", model
    return "inductor", _compile(model, backend="inductor")


def _sparsec(model: Callable[..., Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    return _compile(model, backend="sparsec", **({"options": dict(options)} if options else {}))


def _compile(model: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        arguments["isolate_recompiles"] = True
    compiled: Callable[..., Any] = torch.compile(compat.own_frame(model), dynamic=False, **arguments)
    return compiled


def _tensor(output: Any) -> torch.Tensor:
    """The first tensor in what a model returns; an empty one where it returns none."""
    return next(_tensors(output), torch.empty(0)).detach().float().clone()


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    largest = float(expected.abs().max()) or 1.0
    return float((expected - got).abs().max()) / largest
