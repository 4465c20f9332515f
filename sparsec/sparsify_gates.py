"""Gate steps of ``sparsify``: block by block, gates are put in where the step means, then what they do is measured.

In: a stage whose method has the role ``gate``, its jobs, the calibration data. Out: a ``GatedLayer`` for each gate.
The last quarter of the samples is held out: gates are calibrated on the others, and judged on those. A block that
fails leaves no gate behind, and a block that a journal holds is taken from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from sparsec.blockwise import BlockRun, Data, Walk, WholeRun, find_blocks
from sparsec.errors import BadRecipe
from sparsec.gate_block import GateWork
from sparsec.gated_report import GatedLayer, measured
from sparsec.journal import Journal
from sparsec.passes.gates.layers import gates_of, linked, restored
from sparsec.passes.gates.mlps import Mlp, find_mlps, queries_and_outputs
from sparsec.passes.gates.neurons import reset_neurons
from sparsec.passes.masks.evaluating import evaluating
from sparsec.prunable import Job
from sparsec.recipe import Recipe

HELD_OUT = 4  # one sample of so many


@dataclass
class GateRun:
    """One gate step over one model. ``stored``: blocks that the journal counts before it."""

    model: nn.Module
    recipe: Recipe
    jobs: Mapping[str, Job]
    number: int
    data: Data
    memory: int
    at: Callable[[str], None]
    journal: Journal | None = None
    stored: int = 0
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[GatedLayer]:
        """Every gate of the step, measured where there is data. Raises BadRecipe where it finds nothing to gate."""
        seen, held = split(self.data)
        if self.data and held is self.data:
            self.notes.append("one sample is all the data: gates are judged on what they were calibrated on")
        method = next(iter(self.jobs.values())).step.method_object()
        with evaluating(self.model):
            mlps = self._mlps(method, seen)
            done = [row for run, jobs in self._runs(method, seen) for row in self._block(run, jobs, mlps, seen)]
        if not any(row.form for row in done):
            said = next((note for row in done for note in row.notes), "it has no MLP that can be told apart")
            raise BadRecipe(detail=f"{self._name} finds nothing to gate in this model ({said})")
        linked(self.model)
        reset_neurons(self.model)  # calibration left the sets of its last sequence
        self.at("what the gates zero")
        yield from measured(self.model, done, held) if held else done

    @property
    def _name(self) -> str:
        return str(next(iter(self.jobs.values())).step.method)

    def _mlps(self, method: object, seen: Data) -> tuple[Mlp, ...]:
        if "neurons" not in getattr(method, "needs", ()):
            return ()
        found = find_mlps(self.model, seen[0], set(self.jobs))
        self.notes += [f"{name}: its MLP is left alone: {why}" for name, why in found.declined.items()]
        return found.found

    def _runs(self, method: object, seen: Data) -> Iterator[tuple[BlockRun, dict[str, Job]]]:
        """Each block with its jobs; what is outside the list of blocks, and methods that want all, get the model."""
        left = dict(self.jobs)
        if seen and not getattr(method, "whole", False):
            found = find_blocks(self.model, list(left), self.recipe.blocks)
            walk = Walk(
                self.model,
                found,
                seen,
                propagate_error=self.recipe.propagate_error,
                memory=self.memory,
                seed=self.recipe.seed,
            )
            self.notes += [note for note in (found.note, *walk.notes) if note]
            for run in walk:
                mine = {n: job for n, job in left.items() if n == run.name or n.startswith(f"{run.name}.")}
                left = {n: job for n, job in left.items() if n not in mine}
                yield run, mine
        if left:
            yield WholeRun(self.model, seen, self.memory, self.recipe.seed), left

    def _block(self, run: BlockRun, jobs: Mapping[str, Job], mlps: Sequence[Mlp], data: Data) -> list[GatedLayer]:
        if not jobs:
            return []
        self.at(run.name or "the model")
        index = self.stored
        self.stored += 1
        if self.journal and (held := self.journal.load(index)):
            tensors, said = held
            rows = [GatedLayer.from_dict(row) for row in said]
            restored(self.model, [row.to_dict() for row in rows if row.form])
            with torch.no_grad():
                for name, tensor in _written(self.model, rows).items():
                    tensor.copy_(tensors[name])
            return rows
        work = GateWork(self.model, run, jobs, mlps, queries_and_outputs(self.model), data, self.number)
        method = next(iter(jobs.values())).step.method_object()
        try:
            method.gate(work)
            linked(self.model)
        except BaseException:
            work.undo()
            raise
        if self.journal:
            tensors = {name: t.contiguous() for name, t in _written(self.model, work.rows).items()}
            self.journal.save(index, run.name or "model", tensors, [row.to_dict() for row in work.rows])
        return work.rows


def split(data: Data) -> tuple[Data, Data]:
    """(to calibrate on, held out): the last quarter; of a single sample both are that one."""
    if len(data) < 2:
        return data, data
    cut = len(data) - max(1, len(data) // HELD_OUT)
    return data[:cut], data[cut:]


def _written(model: nn.Module, rows: Sequence[GatedLayer]) -> dict[str, torch.Tensor]:
    """The tensors of these gates, and the biases that hold a shift."""
    places = {(row.name, row.place) for row in rows if row.form}
    found: dict[str, torch.Tensor] = {}
    for name, place, gate in gates_of(model):
        if (name, place) not in places:
            continue
        found.update({f"{name}.{place}.{key}": value for key, value in gate.state_dict(keep_vars=True).items()})
        bias = model.get_submodule(name)._parameters.get("bias")
        if gate.kind == "mode" and bias is not None:
            found[f"{name}.bias"] = bias
    return {name: tensor.detach() for name, tensor in found.items()}
