"""What ``sparsify`` does once everything is checked: masks made and written, stage by stage; a row a layer comes out.

Stages whose steps need no data go layer by layer. The others go block by block (``blockwise``): statistics of the
block's inputs, masks, post-passes, then what the next block gets. A layer is either as it was or finished, and a block
that a journal holds is taken from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from sparsec.blockwise import BlockRun, Data, Found, Walk, find_blocks, first_tensor
from sparsec.errors import SparsecWarning
from sparsec.journal import Journal
from sparsec.passes.masks.allocate.contract import Dense, Learns, Measured, Measures
from sparsec.passes.masks.allocate.spread import keep_of_m
from sparsec.passes.masks.block import Batch, LayerState
from sparsec.passes.masks.contract import GRADIENTS
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.prunable import Job, Selection
from sparsec.recipe import Recipe
from sparsec.sparsify_layer import choosers_of, prune_job, prune_state, row_of, state_of
from sparsec.sparsify_report import PrunedLayer
from sparsec.spill import Spilled
from sparsec.stages import Stage

Tick = Callable[[int, int, str], None]
Sparsities = Mapping[str, "float | torch.Tensor"]


@dataclass
class Runner:
    """One run of a prepared recipe over one model."""

    model: nn.Module
    recipe: Recipe
    stages: Sequence[tuple[Stage, Selection]]
    data: Data
    tick: Tick
    journal: Journal | None = None
    memory: int = 4 << 30
    notes: list[str] = field(default_factory=list)
    _done: int = 0
    _at: str = ""
    _stored: int = 0

    @property
    def total(self) -> int:
        return sum(len(selection.jobs) for _, selection in self.stages)

    def rows(self) -> Iterator[PrunedLayer]:
        try:
            before = 0
            for stage, selection in self.stages:
                number = before + stage.pieces.index(stage.mask) + 1 if stage.mask else 0
                before += len(stage.pieces)
                if not number:
                    continue
                rows = self._blockwise if stage.walks else self._plain
                for row in rows(stage, selection, number):
                    self._done += 1
                    yield row
            self.at("")
        except GeneratorExit:
            raise
        except BaseException:
            if self._done:
                warnings.warn(
                    f"sparsify stopped at {self._at}: {self._done} of {self.total} layers are pruned, the others are "
                    "as they were. Load the model again before another recipe.",
                    SparsecWarning,
                    stacklevel=3,
                )
            raise

    def at(self, name: str) -> None:
        """Say what is worked on now."""
        self._at = name
        self.tick(self._done, self.total, name)

    # ------------------------------------------------------------------------------------------------ layer by layer

    def _plain(self, stage: Stage, selection: Selection, number: int) -> Iterator[PrunedLayer]:
        choosers = choosers_of(selection.jobs)
        for job in selection.jobs:
            self.at(job.layer.name)
            yield prune_job(job, {}, choosers[job], number)

    # ------------------------------------------------------------------------------------------------ block by block

    def _blockwise(self, stage: Stage, selection: Selection, number: int) -> Iterator[PrunedLayer]:
        jobs = {job.layer.name: job for job in selection.jobs}
        with evaluating(self.model):
            found = find_blocks(self.model, list(jobs), self.recipe.blocks)
            gradients = self._gradients(stage, jobs)
            spread = self._allocated(stage, jobs, found)
            work = _Work(self, stage, number, gradients, spread)
            walk = Walk(
                self.model,
                found,
                self.data,
                propagate_error=self.recipe.propagate_error,
                keep_dense=_compares(stage) or _learner(stage) is not None,
                memory=self.memory,
                seed=self.recipe.seed,
            )
            self.notes += [note for note in (found.note, *walk.notes) if note]
            inside: set[str] = set()
            for run in walk:
                mine = {n: job for n, job in jobs.items() if n == run.name or n.startswith(f"{run.name}.")}
                inside |= set(mine)
                yield from work.block(run, mine)
            rest = {n: job for n, job in jobs.items() if n not in inside}
            if rest:
                yield from work.block(self._whole(stage), rest)

    def _whole(self, stage: Stage) -> BlockRun:
        run = WholeRun(self.model, self.data, self.memory, self.recipe.seed)
        if _compares(stage):
            run.dense = Spilled(self.memory, run.outputs())
        return run

    def _gradients(self, stage: Stage, jobs: Mapping[str, Job]) -> Mapping[str, Mapping[str, torch.Tensor]]:
        wanted = [n for piece in stage.pieces for n in piece.method_object().needs if n in GRADIENTS]
        if not wanted:
            return {}
        from sparsec.gradients import gradients

        modules = {name: self.model.get_submodule(name) for name in jobs}
        found: Mapping[str, Mapping[str, torch.Tensor]] = gradients(self.model, self.data, modules, tuple(wanted))
        return found

    def _allocated(self, stage: Stage, jobs: Mapping[str, Job], found: Found) -> Sparsities:
        """Layer -> sparsity from an allocator that measures the dense model; {} where none does."""
        method = stage.allocate.method_object() if stage.allocate else None
        if not isinstance(method, Measures):
            return {}
        measured = []
        walk = Walk(self.model, found, self.data, memory=self.memory)
        names = set(jobs)
        for run in walk:
            mine = [n for n in jobs if n.startswith(f"{run.name}.") or n == run.name]
            names -= set(mine)
            measured.append(self._measure(method, run, mine))
        if names:
            measured.append(self._measure(method, self._whole(stage), [n for n in jobs if n in names]))
        assert stage.mask is not None
        assert stage.mask.sparsity is not None
        allocation = method.allocate([m for m in measured if m.layers], stage.mask.sparsity)
        self.notes += allocation.notes
        pattern = MaskPattern.parse(stage.mask.pattern)
        if pattern.kind != "nm":
            return dict(allocation.sparsity)
        m = pattern.params[1]
        weights = {name: job.layer.weight.numel() for name, job in jobs.items()}
        kept = keep_of_m(allocation.sparsity, weights, m)
        return {name: 1.0 - n / m for name, n in kept.items()}

    def _measure(self, method: Any, run: BlockRun, names: Sequence[str]) -> Measured:
        layers = [job for _, s in self.stages for job in s.jobs if job.layer.name in set(names)]
        by_name = {job.layer.name: job.layer for job in layers}
        stats = run.collect({n: self.model.get_submodule(n) for n in names}, method.needs) if names else {}
        dense = [Dense(n, by_name[n].matrix.float(), stats[n]) for n in names]
        sizes = tuple((n, by_name[n].weight.numel()) for n in names)
        times = None
        if method.keeps == "time":
            from sparsec.expected_time import seconds_of

            times = seconds_of({n: by_name[n].matrix for n in names}, method.target, method.rows)
        return Measured(run.name, sizes, method.measure(dense) if dense else {}, times)


class WholeRun(BlockRun):
    """The model itself as a block: for layers outside the list of blocks, and for models without one."""

    def __init__(self, model: nn.Module, data: Data, memory: int, seed: int) -> None:
        self._first = next(iter(data[0])) if data else ""
        calls: list[Any] = [((), {k: v for k, v in sample.items() if k != self._first}) for sample in data]
        super().__init__("", model, seed, calls, Spilled(memory, (sample[self._first] for sample in data)))

    def run(self, batch: Batch) -> torch.Tensor:
        return first_tensor(self.module(**{self._first: batch.hidden, **(batch.kwargs or {})}))


@dataclass
class _Work:
    """The blocks of one stage."""

    runner: Runner
    stage: Stage
    number: int
    gradients: Mapping[str, Mapping[str, torch.Tensor]]
    spread: Sparsities

    def block(self, run: BlockRun, jobs: Mapping[str, Job]) -> Iterator[PrunedLayer]:
        if not jobs:
            return
        self.runner.at(run.name or "the model")
        index = self.runner._stored
        self.runner._stored += 1
        journal = self.runner.journal
        if journal and (held := journal.load(index)):
            tensors, rows = held
            with torch.no_grad():
                for name, tensor in self._written(run, jobs).items():
                    tensor.copy_(tensors[name])
            yield from (PrunedLayer.from_dict(row) for row in rows)
            return
        before = {name: tensor.clone() for name, tensor in self._written(run, jobs).items() if self._copied(tensor)}
        states: list[LayerState] = []
        try:
            done = self._compress(run, jobs, states)
        except BaseException:
            with torch.no_grad():
                for state in states:
                    state.weight.copy_(state.dense)
                for name, tensor in self._written(run, jobs).items():
                    if name in before:
                        tensor.copy_(before[name])
            raise
        if journal:
            tensors = {name: tensor.contiguous() for name, tensor in self._written(run, jobs).items()}
            journal.save(index, run.name or "model", tensors, [row.to_dict() for row in done])
        yield from done

    def _copied(self, tensor: torch.Tensor) -> bool:
        """Whether what an error puts back needs a copy: else a layer's own fp32 copy holds the same values."""
        return bool(self.stage.reparams) or _learner(self.stage) is not None or tensor.dtype == torch.float64

    def _written(self, run: BlockRun, jobs: Mapping[str, Job]) -> dict[str, torch.Tensor]:
        """What this stage may have changed in the block: its weights; what a reparametrisation folds is anywhere."""
        if self.stage.reparams:
            return {f"{run.name}.{name}": tensor.detach() for name, tensor in run.module.state_dict().items()}
        return {name: job.layer.matrix for name, job in jobs.items()}

    def _compress(self, run: BlockRun, jobs: Mapping[str, Job], states: list[LayerState]) -> list[PrunedLayer]:
        """Rows of the report; ``states`` gets each layer before its weight is written."""
        modules = {name: self.runner.model.get_submodule(name) for name in jobs}
        notes = self._reparam(run, jobs, modules)
        spread = {**self.spread, **self._learned(run, jobs, modules)}
        ordered = self.runner.recipe.true_sequential and run.calls  # without data nothing runs that has an order
        groups = run.groups(modules) if ordered else [list(jobs)]
        samples: dict[str, torch.Tensor] = {}
        for names in groups:
            stats = run.collect({n: modules[n] for n in names}, self._needs)
            for name in names:
                samples[name] = stats[name].pop("sample")
                share = spread.get(name, float(jobs[name].step.sparsity or 0.0))
                states.append(state_of(jobs[name], {**stats[name], **self.gradients.get(name, {})}, share))
                prune_state(jobs[name], states[-1])
        run.layers = states
        for post in self.stage.posts:
            before = [(int(state.keep.sum()), state) for state in states if state.keep is not None]
            post.method_object().refine(run)
            _check(post.method, before)
        rows = [row_of(jobs[s.name], s, samples[s.name], self.number, notes) for s in states]
        run.layers = []
        return rows

    @property
    def _needs(self) -> tuple[str, ...]:
        assert self.stage.mask is not None
        pieces = (self.stage.mask, *self.stage.posts)
        said = [n for piece in pieces for n in piece.method_object().needs if n not in GRADIENTS]
        return tuple(dict.fromkeys(("tokens", *said, "sample")))

    def _reparam(self, run: BlockRun, jobs: Mapping[str, Job], modules: Mapping[str, nn.Module]) -> list[str]:
        notes = []
        for step in self.stage.reparams:
            method = step.method_object()
            stats = run.collect(modules, tuple(method.needs))
            run.layers = [state_of(jobs[n], stats[n], float(jobs[n].step.sparsity or 0.0)) for n in jobs]
            folded = method.apply(run)
            notes += [*folded.notes]
            if folded.gathers:
                notes.append(f"{step.method} left {folded.gathers} layers alone: their inputs cannot be folded into")
            run.layers = []
        return notes

    def _learned(self, run: BlockRun, jobs: Mapping[str, Job], modules: Mapping[str, nn.Module]) -> Sparsities:
        learner = _learner(self.stage)
        if learner is None or not run.name:
            return {}
        assert self.stage.allocate is not None
        assert self.stage.mask is not None
        stats = run.collect(modules, tuple(self.stage.allocate.method_object().needs))
        run.layers = [state_of(jobs[n], stats[n], float(jobs[n].step.sparsity or 0.0)) for n in jobs]
        found = learner.learn(run, float(self.stage.mask.sparsity or 0.0))
        run.layers = []
        return found


def _compares(stage: Stage) -> bool:
    return any(post.method_object().compares for post in stage.posts)


def _learner(stage: Stage) -> Learns | None:
    method = stage.allocate.method_object() if stage.allocate else None
    return method if isinstance(method, Learns) else None


def _check(name: str, before: Sequence[tuple[int, LayerState]]) -> None:
    """A post-pass must leave as many weights as it found, and zeros where its masks prune."""
    for kept, state in before:
        assert state.keep is not None
        if int(state.keep.sum()) != kept or bool(state.weight[~state.keep].count_nonzero()):
            raise RuntimeError(f"{name} changed how many weights of {state.name} are kept")
