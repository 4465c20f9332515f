"""``sparsec.explain(model, *inputs)``: why is my pruned model not faster?

In: a model and the inputs of one call. Out: an ``Explanation``: per layer what its zeros look like, what would run,
why, and what that gains; what was not taken; what would help. ``str()`` is a table, ``to_dict()`` is JSON-able,
``to_html()`` one self-contained page. The model is not changed; Inductor is run only to measure.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from sparsec.errors import BadOptionValue, OptionError, SparsecError
from sparsec.options import Options
from sparsec.records import CompileRecord, StageRecord
from sparsec.report_activation import with_rates
from sparsec.report_data import Cost, Layer, Measured, Whole, layers_of
from sparsec.report_fold import Group, Refusal, fold, not_taken, total

if TYPE_CHECKING:
    import torch

__all__ = ["Explanation", "Layer", "explain", "log_record"]

Progress = Callable[[int, int, str], None]  # steps done, of how many, what

GRADIENTS = (
    "gradients are on here, so torch.compile would leave every layer dense. Run under torch.no_grad() or "
    "torch.inference_mode(); this report shows that case"
)


@dataclass(frozen=True)
class Explanation:
    """What sparsec would do with a model, and why. ``layers`` are in the order of the graph.

    ``batches``: the batch sizes reported; the plain numbers of a layer are those at the first. ``whole``: times of the
    whole model by both engines, where measured. ``spec``: what to write for MODEL in a command, if known; ``tokens`` of
    its inputs (0: unknown).
    """

    model: str
    layers: tuple[Layer, ...]
    refusals: tuple[Refusal, ...]
    batches: tuple[int, ...]
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()
    stages: tuple[StageRecord, ...] = ()
    weights: int = 0
    seconds: float = 0.0
    target: str = ""
    machine: str = ""
    options: Options = field(default_factory=Options)
    whole: Whole | None = None
    spec: str = ""
    tokens: int = 0

    @property
    def groups(self) -> tuple[Group, ...]:
        """Layers that say the same, folded; the largest share of the time first."""
        return fold(self.layers)

    @property
    def not_taken(self) -> tuple[Refusal, ...]:
        """Linear-type operations that stay as they are, by reason."""
        return self.refusals

    def expected(self, batch: int | None = None) -> Cost | None:
        """Summed times of the linear layers by the cost model, at ``batch`` (default: the first)."""
        return total(self.layers, self._index(batch))

    def measured(self, batch: int | None = None) -> Measured | None:
        """Summed times of the linear layers as timed here; None unless ``measure=True``."""
        found = total(self.layers, self._index(batch), measured=True)
        return found if isinstance(found, Measured) else None

    def _index(self, batch: int | None) -> int:
        if batch is None:
            return 0
        if batch not in self.batches:
            raise BadOptionValue(key="batch", value=batch, expected=f"this report has {list(self.batches)}")
        return self.batches.index(batch)

    def to_dict(self, compare: Explanation | None = None) -> dict[str, Any]:
        """Everything as JSON-able values; what ``--json`` prints and the page holds. Times in seconds."""
        from sparsec.report_dict import to_dict

        return to_dict(self, compare)

    def to_html(self, path: str | os.PathLike[str] | None = None, compare: Explanation | None = None) -> str:
        """One page that needs no network; also written to ``path`` if given. ``compare``: what it was before."""
        from sparsec.report_html import to_html

        page = to_html(self, compare)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def text(self, compare: Explanation | None = None) -> str:
        """The table in plain ASCII, at most 120 columns wide."""
        from sparsec.report_text import to_text

        return to_text(self, compare)

    def show(self, file: TextIO | None = None, compare: Explanation | None = None) -> None:
        """Print the table, with colour where ``file`` (default: stdout) is a terminal and NO_COLOR is not set."""
        from sparsec.report_text import show

        show(self, file, compare)

    def __str__(self) -> str:
        return self.text()

    def __repr__(self) -> str:
        from sparsec.report_text import ways

        sparse, _ = ways(self)
        return f"<Explanation of {self.model}: {sparse} of {len(self.layers)} linear layers sparse>"


def explain(
    model: torch.nn.Module,
    *args: Any,
    options: Mapping[str, Any] | None = None,
    measure: bool = False,
    batch: int | Sequence[int] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Say per layer of ``model(*args, **kwargs)`` what sparsec would run, why, and what it gains.

    ``options``: as for ``torch.compile(backend="sparsec")``. ``measure``: also time each distinct layer, about a second
    each, and the whole model on these inputs, compiled twice: by Inductor and by sparsec. ``batch``: batch sizes to
    report for, scaled from the inputs given (default: theirs alone).
    Raises OptionError for wrong options; a model that does not compile gives a report that says so.
    """
    said = Options.parse(options)
    return explain_with(model, args, kwargs, said, measure=measure, batches=_batches(batch, args, kwargs))


def explain_with(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    *,
    measure: bool = False,
    batches: Sequence[int] = (),
    name: str = "",
    spec: str = "",
    tokens: int = 0,
    on_progress: Progress | None = None,
) -> Explanation:
    """``explain`` with parsed options, a name for the model, and progress; what the command line calls."""
    started = time.perf_counter()
    tell = on_progress or (lambda done, total, what: None)
    tell(0, 1, "capture, profile, decide")
    model = getattr(model, "_orig_mod", model)  # an already compiled model is looked at as it was
    from sparsec.pipeline import placed
    from sparsec.rounding import warning_of

    options = placed(options, model)
    with _buffers_kept(model):
        records, notes = _inspect(model, args, kwargs, options)
    notes += filter(None, [warning_of(model)])
    given = batch_of(args, kwargs)
    report = build(records, batches=tuple(batches) or (given,), given=given, options=options)
    report = replace(
        report,
        model=name or name_of(model),
        notes=tuple(notes),
        weights=sum(p.numel() for p in model.parameters()) if hasattr(model, "parameters") else 0,
        spec=spec,
        tokens=tokens,
    )
    if report.layers:
        from sparsec.report_help import what_if

        report = what_if(report)
    if measure and report.layers:
        from sparsec.report_measure import measured

        with _buffers_kept(model):
            report = measured(report, model, args, kwargs, tell)
    report = replace(report, seconds=time.perf_counter() - started)
    _emit(report)
    return report


def build(
    records: Sequence[CompileRecord], *, batches: Sequence[int], given: int, options: Options | None = None
) -> Explanation:
    """A report from the records of a compilation alone. ``given``: the batch that the graphs were made with."""
    options = options or Options()
    target, machine = _target(options)
    stages: dict[str, StageRecord] = {}
    for stage in (s for record in records for s in record.stages):
        before = stages.get(stage.name, StageRecord(stage.name, 0.0, 0))
        stages[stage.name] = StageRecord(stage.name, before.ms + stage.ms, before.changed + stage.changed)
    return Explanation(
        model="",
        layers=with_rates(layers_of(records, batches, given), records, options.policy.cache_dir),
        refusals=not_taken(d for record in records for d in record.declined),
        batches=tuple(batches),
        failures=tuple(dict.fromkeys(record.failure for record in records if record.failure)),
        stages=tuple(stages.values()),
        target=target,
        machine=machine,
        options=options,
    )


def log_record(record: CompileRecord) -> str:
    """The table of one compiled graph, for ``SPARSEC_LOG=explain``; also put into torch's structured trace."""
    sizes = [x for layer in record.layers if layer.site.x_shape and isinstance(x := layer.site.x_shape[0], int)]
    given = max(set(sizes), key=sizes.count, default=1)
    report = replace(build([record], batches=(given,), given=given), model="one compiled graph")
    _emit(report)
    return report.text()


def name_of(model: torch.nn.Module) -> str:
    """The checkpoint's name where the model knows it, else the class's."""
    said = str(getattr(model, "name_or_path", "") or "")
    if os.path.isdir(said):
        parts = Path(said).resolve().parts
        said = "/".join(parts[-2:]) if parts[-1] in ("model", "models") else parts[-1]
    return said or type(model).__name__


def batch_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The leading size of the first tensor among the inputs, at least 1."""
    for value in (*args, *kwargs.values()):
        shape = getattr(value, "shape", None)
        if shape is not None and len(shape) > 0:
            return max(int(shape[0]), 1)
    return 1


def _batches(said: int | Sequence[int] | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    if said is None:
        return (batch_of(args, kwargs),)
    sizes = [said] if isinstance(said, int) else list(said)
    wrong = [b for b in sizes if isinstance(b, bool) or not isinstance(b, int) or b < 1]
    if not sizes or wrong:
        raise BadOptionValue(key="batch", value=said, expected="a number of at least 1, or a list of them, is needed")
    return tuple(dict.fromkeys(sizes))


@contextlib.contextmanager
def _buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Called in training mode, a model updates its running statistics; after a look they are what they were."""
    buffers = list(model.buffers()) if getattr(model, "training", False) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, old in zip(buffers, before, strict=True):
            if not buffer.equal(old):
                buffer.detach().copy_(old)


def _inspect(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> tuple[list[CompileRecord], list[str]]:
    """The records, and what the reader must know first. A failure becomes a record; wrong options raise."""
    import torch

    records = _captured(model, args, kwargs, options)
    declined = [d for record in records for d in record.declined]
    stopped = any("gradients are on" in d.reason for d in declined) and not any(record.layers for record in records)
    if not (torch.is_grad_enabled() and stopped):
        return records, []
    with torch.no_grad():
        return _captured(model, args, kwargs, options), [GRADIENTS]


def _captured(
    model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], options: Options
) -> list[CompileRecord]:
    from sparsec import pipeline

    try:
        return pipeline.inspect(model, args, kwargs, options)
    except Exception as error:
        return [CompileRecord(failure=_failure(error, model, args, kwargs))]


def _failure(error: Exception, model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What went wrong, in a sentence. Raises where the user's options did."""
    chain = causes(error)
    for cause in chain:
        if isinstance(cause, OptionError):
            raise cause from None
        if isinstance(cause, SparsecError):
            return str(cause)
    stage = next((s for c in chain if (s := getattr(c, "sparsec_stage", ""))), "")
    try:
        if not stage:
            model(*args, **kwargs)
    except Exception as own:
        from sparsec.report_text import MODEL_RAISES

        return f"{MODEL_RAISES} {type(own).__name__} on these inputs: {first_line(own)}"
    return f"{stage or 'capture'}: {type(chain[-1]).__name__}: {first_line(chain[-1])}"


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that torch adds."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, outermost first."""
    chain = [error]
    while (inner := getattr(chain[-1], "inner_exception", None) or chain[-1].__cause__) and inner not in chain:
        chain.append(inner)
    return chain


def _target(options: Options) -> tuple[str, str]:
    """(``cpu: avx512+bf16 2c``, the machine's own name)."""
    try:
        from sparsec import targets

        t = targets.resolve(options.policy.target)
    except OptionError:
        raise
    except Exception as error:  # a report must come out on any machine
        return f"unknown target ({type(error).__name__})", ""
    return f"{t.name}: {t.isa}{'+bf16' if t.bf16_dot else ''} {t.cores}c", t.model


def _emit(report: Explanation) -> None:
    """Beside Inductor's files in tlparse, where TORCH_TRACE is on."""
    from sparsec import compat

    compat.emit_artifact("sparsec_explain", report.text())
