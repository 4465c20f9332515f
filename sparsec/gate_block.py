"""One block of a model while gates are put into it: the ``GateBlock`` of ``sparsec.passes.gates.contract``.

In: a ``BlockRun``, the jobs of the step in it, the MLPs of the model. Out: gates in the model and a row for each. What
was put in is taken out again by ``undo``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from sparsec.blockwise import BlockRun, Data
from sparsec.collecting import given, rows_of
from sparsec.errors import BadRecipe, NonFinite
from sparsec.gated_report import GatedLayer
from sparsec.gradients import loss_of
from sparsec.gradients import rows_of as sequences_of
from sparsec.passes.gates.contract import Place, See, Side, Site
from sparsec.passes.gates.forms import Gate
from sparsec.passes.gates.layers import GatedActivation, put, refusal
from sparsec.passes.gates.mlps import Mlp
from sparsec.passes.masks.evaluating import evaluating
from sparsec.prunable import Job


class GateWork:
    """``data``: of the calibration, for the losses of methods that are given the whole model."""

    def __init__(
        self,
        model: nn.Module,
        run: BlockRun,
        jobs: Mapping[str, Job],
        mlps: Sequence[Mlp],
        queries_and_outputs: frozenset[str],
        data: Data,
        number: int,
    ) -> None:
        self.model, self.run, self.data, self.number = model, run, data, number
        self.name, self.module, self.seed = run.name, run.module, run.seed
        self.rows: list[GatedLayer] = []
        self._undo: list[Callable[[], None]] = []
        self._method = next(iter(jobs.values())).step.method
        self._phase = {name: str(getattr(job.step, "phase", None) or "all") for name, job in jobs.items()}
        self.sites: dict[str, Site] = {}
        for name, job in jobs.items():
            module = model.get_submodule(name)
            if why := refusal(module, "input"):
                self.leave(name, why)
            else:
                self.sites[name] = Site(name, module, job.step.sparsity, job.step.method_object())
        self.mlps = [mlp for mlp in mlps if mlp.reader in self.sites]
        self.queries_and_outputs = queries_and_outputs & set(self.sites)

    def module_of(self, name: str) -> nn.Module:
        return self.model.get_submodule(name)

    def groups(self) -> list[list[str]]:
        return self.run.groups({name: site.module for name, site in self.sites.items()}) if self.sites else []

    def watch(self, see: Mapping[str, See], side: Side = "in") -> None:
        mask: torch.Tensor | None = None

        def hook(name: str) -> Callable[..., None]:
            module = self.model.get_submodule(name)

            def on_read(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                see[name](_finite(rows_of(module, given(args, kwargs), mask).float(), name, "the inputs"))

            def on_made(_: nn.Module, args: Any, y: torch.Tensor) -> None:
                see[name](_finite(rows_of(nn.Identity(), y, mask).float(), name, "the outputs"))

            return on_read if side == "in" else on_made

        with ExitStack() as stack, torch.no_grad():
            for name in see:
                module = self.model.get_submodule(name)
                if isinstance(module, GatedActivation) and side == "out":
                    module = module.act  # an earlier gate is about to be replaced
                if side == "in":
                    stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
                else:
                    stack.callback(module.register_forward_hook(hook(name)).remove)
            for i, batch in enumerate(self.run.batches()):
                mask = self.run.masks[i] if self.run.masks else None
                self.run.run(batch)

    def watch_sequences(self, name: str, see: See) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            x = _finite(given(args, kwargs).detach().float(), name, "the inputs")
            see(x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1]))

        with ExitStack() as stack, torch.no_grad():
            module = self.model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for batch in self.run.batches():
                self.run.run(batch)

    def outputs(self) -> Iterator[torch.Tensor]:
        return self.run.outputs()

    def put(self, name: str, place: Place, gate: Gate, asked: float | None, notes: Sequence[str] = ()) -> None:
        gate.phase = self._phase.get(name) or next(iter(self._phase.values()))
        try:
            self._undo.append(put(self.model, name, place, gate))
        except ValueError as error:
            raise BadRecipe(detail=f"{self._method} cannot gate {name}: {error}") from None
        self.rows.append(
            GatedLayer(
                name, place, self._method, gate.words, asked, step=self.number, gate=gate.said, notes=tuple(notes)
            )
        )

    def leave(self, name: str, why: str) -> None:
        self.rows.append(GatedLayer(name, "input", self._method, "", step=self.number, notes=(f"left alone: {why}",)))

    def undo(self) -> None:
        """Take every gate of this block out again."""
        for one in reversed(self._undo):
            one()
        self._undo.clear()

    def losses(self) -> Iterator[torch.Tensor]:
        with torch.inference_mode(False), evaluating(self.model), torch.enable_grad():
            for i, sample in enumerate(sequences_of(self.data), 1):
                yield loss_of(self.model, sample, f" in sample {i}")

    @contextmanager
    def keeping(self, names: Sequence[str], read: dict[str, torch.Tensor]) -> Iterator[None]:
        def hook(name: str) -> Callable[..., None]:
            def see(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                x = given(args, kwargs)
                if not x.requires_grad and torch.is_grad_enabled():
                    x.requires_grad_(True)  # a model whose parameters are frozen
                read[name] = x

            return see

        with ExitStack() as stack:
            for name in names:
                module = self.model.get_submodule(name)
                stack.callback(module.register_forward_pre_hook(hook(name), with_kwargs=True).remove)
            yield


def _finite(x: torch.Tensor, name: str, what: str) -> torch.Tensor:
    if not bool(x.isfinite().all()):
        raise NonFinite(what=what, name=repr(name), where="")
    return x
