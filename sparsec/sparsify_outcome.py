"""What pruning a model cost and what it gains here: ``sparsify`` with everything measured around it.

In: a model, a recipe, data. Out: an ``Outcome``: the ``Report`` of ``sparsify``, accuracy before and after with a
paired interval, what would run on this machine and how fast (``sparsec.explain``), and memory beside its forecast. The
weights are the same, bit for bit, as without any of this: what is looked at does not depend on the looking.

Only one model is ever in memory: what the dense one says of each window is kept as a number (causal) or as an
embedding (encoder) before its weights change. What cannot be measured becomes a sentence, never a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec import evaluate
from sparsec.calibration import Calibrated, segments_of
from sparsec.calibration_text import named
from sparsec.cli.common import progress as progress_bar
from sparsec.errors import InputError, SparsecError
from sparsec.explain import Explanation, explain_with, first_line, name_of
from sparsec.models import LoadedModel, kind_of
from sparsec.options import Options
from sparsec.passes.masks.evaluating import evaluating
from sparsec.recipe import Calibration
from sparsec.resident import Resident
from sparsec.sparsify import DEFAULT_MEMORY, Prepared, Report, calibrated_for, execute, prepare

WINDOWS = 64  # paired differences are told from noise with few; each costs two forwards
LOGIT_BYTES = 64 << 20  # of the logits of one batch of windows


@dataclass(frozen=True)
class Accuracy:
    """One metric of the same windows before and after. ``differences``: after - before of each window, in nats per
    token (ppl) or in cosine; ``text``: what they were cut from, in words."""

    result: evaluate.Result
    differences: tuple[float, ...]
    text: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        result = asdict(self.result) | {"interval": list(self.result.interval) if self.result.interval else None}
        return asdict(self) | {"result": result, "differences": list(self.differences)}


@dataclass(frozen=True)
class Memory:
    """Bytes. ``model``: of its parameters and buffers. ``before``: what this process held when pruning began;
    ``pruned``: the most while it went on; ``peak``: the most of all. Where the most cannot be reset (not Linux),
    ``before`` and ``pruned`` are the most until then. ``forecast``: what the dry run says pruning needs beside the
    model."""

    model: int
    before: int
    pruned: int
    peak: int
    forecast: int


@dataclass(frozen=True)
class Outcome:
    """``accuracy`` and ``speed`` are None where ``notes`` say why. ``seconds`` of pruning were forecast before."""

    model: str
    report: Report
    memory: Memory
    forecast_seconds: float
    accuracy: Accuracy | None = None
    speed: Explanation | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON types: the keys of ``Report.to_dict`` and model, accuracy, speed, memory, outcome_notes."""
        from sparsec.sparsify_pages import to_dict

        return to_dict(self)

    def to_html(self) -> str:
        """One page that needs no network."""
        from sparsec.sparsify_pages import to_html

        return to_html(self)

    def files(self) -> dict[str, str]:
        """What is saved beside the model: name -> content."""
        import json

        return {
            "sparsec_report.json": json.dumps(self.to_dict(), indent=1) + "\n",
            "sparsec_report.html": self.to_html(),
        }

    def __str__(self) -> str:
        from sparsec.sparsify_pages import lines

        return "\n".join([str(self.report), "", *lines(self)])


@dataclass(frozen=True)
class Wanted:
    """What to look at beside pruning. ``text``: a file to evaluate on; None: what calibration left of its text.

    ``windows``: how many at most. ``spec``: what to write for MODEL in the commands that the page shows.
    """

    accuracy: bool = True
    text: str | os.PathLike[str] | None = None
    windows: int = WINDOWS
    speed: bool = True
    measure: bool = False
    spec: str = ""


def sparsify_outcome(
    model: nn.Module,
    recipe: object,
    data: Any = None,
    *,
    tokenizer: Any = None,
    example: Any = None,
    wanted: Wanted | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    max_memory: int = DEFAULT_MEMORY,
) -> Outcome:
    """``sparsify(model, recipe, data)`` with everything measured around it; the model is pruned in place.

    ``example``: arguments of one call of forward, by which models that are no transformers models are explained.
    Raises what ``sparsify`` raises, and UnreadableCalibration for a ``wanted.text`` that cannot be read.
    """
    if example is None and isinstance(data, (list, torch.Tensor)) and len(data):
        example = data[0] if isinstance(data, list) else data[:1]
    prepared = prepare(model, recipe)
    loaded = as_loaded(prepared.model, tokenizer, example)
    return run(loaded, prepared, wanted or Wanted(), data=data, progress=progress, resume=resume, max_memory=max_memory)


def as_loaded(model: nn.Module, tokenizer: Any = None, example: Any = None) -> LoadedModel:
    """A module that the caller holds, as the functions that evaluate and explain take it."""
    config = getattr(model, "config", None)
    name, kind = type(model).__name__, "module"
    if hasattr(config, "architectures") and (hasattr(config, "vocab_size") or hasattr(config, "image_size")):
        kind = "causal" if name.endswith(("ForCausalLM", "LMHeadModel")) else kind_of(config)
    return LoadedModel(model, tokenizer, kind, "", name_of(model), example)


def run(
    loaded: LoadedModel,
    prepared: Prepared,
    wanted: Wanted,
    *,
    data: Any = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    max_memory: int = DEFAULT_MEMORY,
    keep_journal: bool = False,
) -> Outcome:
    """Prune ``prepared.model``, which ``loaded`` holds; what the command line calls. Keywords are of ``execute``."""
    looked = _Looked(loaded, prepared, wanted, data, progress)
    read = data
    if prepared.needs_data and not isinstance(data, Calibrated):
        read = calibrated_for(prepared, data, loaded.tokenizer)
    tokens = read.tokens if isinstance(read, Calibrated) else None
    forecast = prepared.to_dict(tokens, max_memory)
    size = sum(t.numel() * t.element_size() for t in (*loaded.model.parameters(), *loaded.model.buffers()))
    looked.before()
    resident = Resident()
    report = execute(
        prepared,
        read,
        tokenizer=loaded.tokenizer,
        progress=progress,
        resume=resume,
        max_memory=max_memory,
        keep_journal=keep_journal,
    )
    pruned = resident.highest()
    accuracy, speed = looked.after(), looked.explained()
    memory = Memory(size, resident.before, pruned, resident.peak(), int(forecast["scratch_bytes"]))
    return Outcome(loaded.name, report, memory, float(forecast["seconds"]), accuracy, speed, tuple(looked.notes))


@dataclass
class _Looked:
    """What is looked at before and after. Whatever goes wrong here is a note."""

    loaded: LoadedModel
    prepared: Prepared
    wanted: Wanted
    data: Any
    progress: bool
    notes: list[str] = field(default_factory=list)
    windows: list[list[int]] = field(default_factory=list)
    text: str = ""
    dense: torch.Tensor | None = None

    def before(self) -> None:
        """Choose the windows and keep what the model says of them. Raises SparsecError for a wrong ``--eval-text``."""
        if not self.wanted.accuracy:
            return
        try:
            self.windows, self.text = self._windows()
            self.dense = self._read("the dense model")
        except SparsecError as error:
            if self.wanted.text is not None:
                raise
            self._missed("accuracy", error)
        except Exception as error:  # whatever a model's forward raises
            self._missed("accuracy", error)

    def after(self) -> Accuracy | None:
        if self.dense is None:
            return None
        try:
            result, differences = evaluate.compare_windows(self.dense, self._read("the pruned model"))
        except Exception as error:
            self._missed("accuracy", error)
            return None
        return Accuracy(result, differences, self.text, sum(map(len, self.windows)))

    def explained(self) -> Explanation | None:
        """What would run here. Of causal models for one new token, and for one of each of 16 users."""
        if not self.wanted.speed:
            return None
        causal = self.loaded.kind == "causal"
        tokens = 1 if causal else min(128, self.loaded.context or 128)
        try:
            with (
                progress_bar("explain", quiet=not self.progress) as step,
                torch.no_grad(),
                evaluating(self.loaded.model),
            ):
                return explain_with(
                    self.loaded.model,
                    (),
                    self.loaded.prompt(1, tokens),
                    Options(),
                    measure=self.wanted.measure,
                    batches=(1, 16) if causal else (1,),
                    name=self.loaded.name,
                    spec=self.wanted.spec,
                    tokens=tokens,
                    on_progress=step,
                )
        except Exception as error:
            self._missed("speed", error)
            return None

    def _missed(self, what: str, error: Exception) -> None:
        kind = "" if isinstance(error, SparsecError) else f"{type(error).__name__}: "
        said = error.fields.get("detail") if isinstance(error, SparsecError) else None
        self.notes.append(f"{what} was not measured: {kind}{said or first_line(error)}")

    def _read(self, what: str) -> torch.Tensor:
        vocabulary = int(getattr(self.loaded.config, "vocab_size", 1))
        longest = max(map(len, self.windows))
        batch = max(1, min(8, LOGIT_BYTES // (4 * vocabulary * longest)))
        with progress_bar(f"evaluate {what}", quiet=not self.progress) as step, evaluating(self.loaded.model):
            return evaluate.read_windows(self.loaded, self.windows, batch=batch, step=step)

    def _windows(self) -> tuple[list[list[int]], str]:
        """Token ids that calibration does not see, spread over the text. Raises InputError where there are none."""
        if self.loaded.kind not in ("causal", "encoder"):
            raise InputError(detail=f"{self.loaded.name} takes no text")
        window = evaluate.check_window(None, self.loaded)
        if self.wanted.text is not None:
            source, rows = named(Path(self.wanted.text), Calibration())
            text = "\n\n".join(row if isinstance(row, str) else str(row.get("text", "")) for row in rows)
            found = evaluate.text_windows(self.loaded, text, window=window)
            return spread(found, self.wanted.windows), source
        return self._left(window)

    def _left(self, window: int) -> tuple[list[list[int]], str]:
        settings = self.prepared.recipe.calibration
        said = settings.dataset if self.data is None else self.data
        if said is None or hasattr(said, "__next__"):
            raise InputError(detail="there is no text to measure it on; name one with --eval-text")
        calibrates = self.prepared.needs_data
        if not calibrates:
            settings = settings.model_copy(update={"seqlen": window})
        drawn = segments_of(said, settings, self.loaded.model, self.loaded.tokenizer)
        if drawn is None:
            raise InputError(detail="the calibration data is no text; name one with --eval-text")
        left = drawn.rest if calibrates else [*drawn.segments, *drawn.rest]
        window = min([window, *map(len, left)])
        found = [part for ids in left for part in self._cut(ids, window) if len(part) > 1]
        if not found:
            raise InputError(detail="calibration used all of its text; name another with --eval-text")
        source = repr(os.fspath(said)) if isinstance(said, (str, os.PathLike)) else "the calibration data"
        return spread(
            found, self.wanted.windows
        ), f"{source}, parts that calibration did not see" if calibrates else source

    def _cut(self, ids: list[int], window: int) -> Iterator[list[int]]:
        if self.loaded.kind == "encoder":  # a segment has its special tokens around it
            yield ids
            return
        for start in range(0, len(ids) - window + 1, window):
            yield ids[start : start + window]


def spread(windows: list[list[int]], most: int) -> list[list[int]]:
    """At most so many, at even distances."""
    if len(windows) <= most:
        return windows
    return [windows[i * len(windows) // most] for i in range(most)]
