"""What ``sparsify`` does once everything is checked: masks made and written, stage by stage; a row a layer comes out.

Stages whose steps need no data go layer by layer. The others go block by block (``blockwise``): statistics of the
block's inputs, masks, post-passes, then what the next block gets. A layer is either as it was or finished, and a block
that a journal holds is taken from there.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from sparsec.blockwise import BlockRun, Data, Found, Walk, WholeRun, find_blocks
from sparsec.errors import SparsecWarning
from sparsec.gated_report import GatedLayer
from sparsec.journal import Journal
from sparsec.passes.masks.allocate.contract import Measures
from sparsec.passes.masks.block import LayerState
from sparsec.passes.masks.contract import GRADIENTS
from sparsec.passes.masks.evaluating import evaluating
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.quantize.inputs import inputs_of, set_inputs
from sparsec.passes.reparam.contract import held_by
from sparsec.prunable import Job, Selection
from sparsec.recipe import Recipe
from sparsec.recipe_steps import Gates
from sparsec.sparsify_gates import GateRun
from sparsec.sparsify_layer import choosers_of, prune_job, prune_state, round_inputs, row_of, state_of
from sparsec.sparsify_report import PrunedLayer
from sparsec.sparsify_spread import Sparsities, learned, learner_of, left_out, measured, unlearned
from sparsec.spill import Spilled
from sparsec.stages import Stage

Tick = Callable[[int, int, str], None]
Gradients = dict[str, Mapping[str, torch.Tensor]]  # layer -> statistic -> [N, K]


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
    gates: list[GatedLayer] = field(default_factory=list)  # rows of gate steps
    held: set[tuple[str, str]] = field(default_factory=set)  # what masks so far keep in its order, see ``Block``
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
                if isinstance(stage.mask, Gates):
                    self._gated(selection, number)
                    continue
                rows = self._blockwise if stage.walks else self._plain
                for row in rows(stage, selection, number):
                    self._done += 1
                    self.held |= {(row.name, side) for side in held_by(MaskPattern.parse(row.pattern))}
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

    def _gated(self, selection: Selection, number: int) -> None:
        jobs = {job.layer.name: job for job in selection.jobs}
        run = GateRun(
            self.model, self.recipe, jobs, number, self.data, self.memory, self.at, self.journal, self._stored
        )
        self.gates += run.rows()
        self._done += len(jobs)
        self._stored = run.stored
        self.notes += run.notes

    def at(self, name: str) -> None:
        """Say what is worked on now."""
        self._at = name
        self.tick(self._done, self.total, name)

    # ------------------------------------------------------------------------------------------------ layer by layer

    def _plain(self, stage: Stage, selection: Selection, number: int) -> Iterator[PrunedLayer]:
        choosers = choosers_of(selection.jobs)
        for job in selection.jobs:
            self.at(job.layer.name)
            row = prune_job(job, {}, choosers[job], number)
            inputs, notes = round_inputs(job, self.model.get_submodule(job.layer.name), {})
            yield replace(row, inputs=inputs, notes=(*row.notes, *notes))

    # ------------------------------------------------------------------------------------------------ block by block

    def _blockwise(self, stage: Stage, selection: Selection, number: int) -> Iterator[PrunedLayer]:
        jobs = {job.layer.name: job for job in selection.jobs}
        with evaluating(self.model):
            found = find_blocks(self.model, list(jobs), self.recipe.blocks)
            gradients = self._gradients(stage, jobs, number)
            spread = self._allocated(stage, jobs, found)
            work = _Work(self, stage, number, gradients, spread)
            walk = Walk(
                self.model,
                found,
                self.data,
                propagate_error=self.recipe.propagate_error,
                keep_dense=_compares(stage) or learner_of(stage) is not None,
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
                work.outside = bool(inside)
                if work.outside:
                    self.notes += unlearned(stage, rest)
                yield from work.block(self._whole(stage, learns=not work.outside), rest)

    def _whole(self, stage: Stage, learns: bool) -> BlockRun:
        run = WholeRun(self.model, self.data, self.memory, self.recipe.seed)
        if _compares(stage) or (learns and learner_of(stage) is not None):
            run.dense = Spilled(self.memory, run.outputs())
        return run

    def _gradients(self, stage: Stage, jobs: Mapping[str, Job], number: int) -> Gradients:
        """Of the model as the stages before left it: they may have moved its channels, and the gradients with them."""
        wanted = [n for piece in stage.pieces for n in piece.method_object().needs if n in GRADIENTS]
        if not wanted:
            return {}
        from sparsec.gradients import gradients

        if stage is not self.stages[0][0]:
            self.notes.append(f"step {number}: its gradients are those of the model that the steps before it left")
        modules = {name: self.model.get_submodule(name) for name in jobs}
        return dict(
            gradients(
                self.model,
                self.data,
                modules,
                tuple(wanted),
                seed=self.recipe.seed,
                tick=lambda i, of, what: self.at(f"{what}, sample {i} of {of}"),
            )
        )

    def _allocated(self, stage: Stage, jobs: Mapping[str, Job], found: Found) -> Sparsities:
        """Layer -> sparsity from an allocator that measures the dense model; {} where none does."""
        self.notes += left_out(stage, jobs)
        if stage.allocate is None or not isinstance(stage.allocate.method_object(), Measures):
            return {}
        walk = Walk(self.model, found, self.data, memory=self.memory)
        whole = partial(WholeRun, self.model, self.data, self.memory, self.recipe.seed)
        allocation = measured(stage, jobs, walk, whole)
        self.notes += allocation.notes
        return allocation.sparsity


@dataclass
class _Work:
    """The blocks of one stage."""

    runner: Runner
    stage: Stage
    number: int
    gradients: Gradients  # of each layer's weight as it lies now: a rewrite of the stage moves them
    spread: Sparsities
    outside: bool = False  # the layers are outside the list of blocks, and what blocks learn is not for them

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
            for row in rows:
                set_inputs(self.runner.model.get_submodule(row["name"]), row["inputs"])
                yield PrunedLayer.from_dict(row)
            return
        before = {name: tensor.clone() for name, tensor in self._written(run, jobs).items() if self._copied(tensor)}
        inputs = {name: inputs_of(self.runner.model.get_submodule(name)) for name in jobs}
        states: list[LayerState] = []
        try:
            done = self._compress(run, jobs, states)
        except BaseException:
            for name, said in inputs.items():
                set_inputs(self.runner.model.get_submodule(name), said)
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
        return bool(self.stage.rewrites) or learner_of(self.stage) is not None or tensor.dtype == torch.float64

    def _written(self, run: BlockRun, jobs: Mapping[str, Job]) -> dict[str, torch.Tensor]:
        """What this stage may have changed in the block: its weights; what a reparametrisation folds is anywhere."""
        if self.stage.rewrites:
            return {f"{run.name}.{name}": tensor.detach() for name, tensor in run.module.state_dict().items()}
        return {name: job.layer.matrix for name, job in jobs.items()}

    def _compress(self, run: BlockRun, jobs: Mapping[str, Job], states: list[LayerState]) -> list[PrunedLayer]:
        """Rows of the report; ``states`` gets each layer before its weight is written."""
        modules = {name: self.runner.model.get_submodule(name) for name in jobs}
        run.held = self.runner.held
        notes = self._reparam(run, jobs, modules)
        spread = {**self.spread, **({} if self.outside else learned(self.stage, jobs, run))}
        ordered = self.runner.recipe.true_sequential and run.calls  # without data nothing runs that has an order
        groups = run.groups(modules) if ordered else [list(jobs)]
        samples: dict[str, torch.Tensor] = {}
        rounds: dict[str, tuple[str, tuple[str, ...]]] = {}
        for names in groups:
            stats = run.collect({n: modules[n] for n in names}, self._needs)
            for name in names:
                samples[name] = stats[name].pop("sample")
                share = spread.get(name, float(jobs[name].step.sparsity or 0.0))
                states.append(state_of(jobs[name], {**stats[name], **self.gradients.get(name, {})}, share))
                prune_state(jobs[name], states[-1])
                rounds[name] = round_inputs(jobs[name], modules[name], stats[name])
        run.layers = states
        for post in self.stage.posts:
            before = [(int(state.keep.sum()), state) for state in states if state.keep is not None]
            post.method_object().refine(run)
            _check(post.method, before)
        rows = [
            row_of(jobs[s.name], s, samples[s.name], self.number, (*notes, *rounds[s.name][1]), rounds[s.name][0])
            for s in states
        ]
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
        for name, method in self.stage.rewrites:
            stats = run.collect(modules, tuple(method.needs))
            run.layers = [
                state_of(jobs[n], {**stats[n], **self.gradients.get(n, {})}, float(jobs[n].step.sparsity or 0.0))
                for n in jobs
            ]
            folded = method.apply(run)
            for state in run.layers:
                if held := self.gradients.get(state.name):
                    self.gradients[state.name] = {kind: state.stats[kind] for kind in held}
            notes += [*folded.notes]
            if folded.gathers:
                notes.append(f"{name} left {folded.gathers} layers alone: their inputs cannot be folded into")
            run.layers = []
        return notes


def _compares(stage: Stage) -> bool:
    return any(post.method_object().compares for post in stage.posts)


def _check(name: str, before: Sequence[tuple[int, LayerState]]) -> None:
    """A post-pass must leave as many weights as it found, and zeros where its masks prune."""
    for kept, state in before:
        assert state.keep is not None
        if int(state.keep.sum()) != kept or bool(state.weight[~state.keep].count_nonzero()):
            raise RuntimeError(f"{name} changed how many weights of {state.name} are kept")
