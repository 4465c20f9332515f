"""``sparsify``: masks from a recipe, written into a model as exact zeros.

In: an ``nn.Module``, a recipe, and calibration data where the method needs it. Out: the same model, still plain
PyTorch, with zeros in its weights, and a ``Report``. Everything that can be wrong with the recipe for this model is
found by ``prepare`` before the first weight changes; then each layer's mask is complete before its weight is written.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from sparsec import __version__
from sparsec.cache import digest
from sparsec.cli.common import progress as progress_bar
from sparsec.errors import BadRecipe, SparsecWarning, UnprunableLayer
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.contract import Choose, Pruned, Scores, Statistics, Updates, prune
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.masks.select import Selector, select_pool
from sparsec.prunable import Job, Selection, select_layers, survey
from sparsec.recipe import Recipe
from sparsec.sparsify_report import PrunedLayer, Report

__all__ = ["Prepared", "PrunedLayer", "Report", "execute", "methods", "prepare", "sparsify"]

_SAMPLED = 512  # values of each tensor that the model's fingerprint reads
_SCRATCH = 24  # bytes a weight beside the model while its layer is pruned: scores, keys, masks, the new values
_TIMED = 1 << 20  # weights that a forecast times


@dataclass(frozen=True)
class Prepared:
    """A checked recipe for one model: what would be pruned, and how. Nothing has been written."""

    recipe: Recipe
    steps: tuple[Selection, ...]
    notes: tuple[str, ...]
    model_sha: str

    @property
    def jobs(self) -> list[tuple[int, Job]]:
        """Every (number of the step, job), in the order in which they run."""
        return [(number, job) for number, step in enumerate(self.steps, 1) for job in step.jobs]

    def to_dict(self) -> dict[str, Any]:
        """The forecast, as JSON types. ``scratch_bytes`` and ``seconds`` are estimates, the latter timed on a piece."""
        layers = [
            {
                "name": job.layer.name,
                "shape": list(job.layer.shape),
                "step": number,
                "method": job.step.method,
                "pattern": job.step.pattern,
                "scope": job.step.scope,
                "sparsity": job.step.sparsity,
                "notes": list(job.notes),
            }
            for number, job in self.jobs
        ]
        largest = max(job.layer.weight.numel() for _, job in self.jobs)
        return {
            "recipe": self.recipe.to_dict(),
            "recipe_sha": self.recipe.sha,
            "model_sha": self.model_sha,
            "layers": layers,
            "weights": sum(job.layer.weight.numel() for _, job in self.jobs),
            "scratch_bytes": _SCRATCH * largest,
            "seconds": _forecast_seconds(self),
            "notes": list(self.notes),
        }


def _forecast_seconds(prepared: Prepared) -> float:
    """Time a mask of a piece of the largest layer, scaled to all weights; a pool reads its scores four times."""
    job = max((job for _, job in prepared.jobs), key=lambda job: job.layer.weight.numel())
    piece = job.layer.matrix[: max(1, _TIMED // job.layer.shape[1])]
    choose = Selector(MaskPattern.parse(job.step.pattern), float(job.step.sparsity or 0.0))
    for _ in range(2):  # the first call also pays for what torch loads late
        started = time.perf_counter()
        prune(job.step.method_object(), piece, {}, choose)
    per_weight = (time.perf_counter() - started) / piece.numel()
    return sum(
        per_weight * job.layer.weight.numel() * (4 if job.step.scope == "global" else 1) for _, job in prepared.jobs
    )


def sparsify(model: nn.Module, recipe: object, data: Iterable[Any] | None = None, *, progress: bool = True) -> Report:
    """Prune ``model`` in place: its weights get exact zeros, nothing else about it changes. Gives a ``Report``.

    ``recipe`` is a method name (``"magnitude"``), a dict (``{"method": "magnitude", "sparsity": 0.7, "pattern":
    "2:4"}``), a list of those, or a YAML, JSON or TOML file; see ``sparsec.recipe``. ``data`` is an iterable of input
    tensors, or of keyword dicts for the model's forward, for methods that need calibration. Weights of every floating
    dtype of 16 bits or more keep their dtype, device and identity; tied weights are pruned once.

    Raises a RecipeError before any weight has changed when the recipe does not fit itself or the model (unknown
    method, key or layer, impossible pattern, NaN weights). Should anything fail later, a SparsecWarning says at which
    layer; each layer is then either as it was or finished.
    """
    return execute(prepare(model, recipe), data, progress=progress)


def execute(prepared: Prepared, data: Iterable[Any] | None = None, *, progress: bool = True) -> Report:
    """Do what was prepared: write the masks into the model that it was prepared for."""
    started = time.perf_counter()
    notes = list(prepared.notes)
    if data is not None:
        notes.append("data was not read: no step of this recipe needs calibration")
    with progress_bar("sparsify", quiet=not progress) as tick:
        rows = tuple(_rows(prepared, tick))
    return Report(prepared.recipe, rows, tuple(notes), time.perf_counter() - started, prepared.model_sha)


def methods() -> dict[str, str]:
    """Every method's name with one line about it."""
    return {name: _line(method_class(name)) for name in METHODS}


def _line(cls: type[Any]) -> str:
    text = (cls.__doc__ or "").strip().splitlines()[0]
    return text.removesuffix(".")


def prepare(model: nn.Module, recipe: object) -> Prepared:
    """Check a recipe against a model and fill in its defaults; nothing is written. Raises a RecipeError."""
    model = _unwrapped(model)
    asked = Recipe.load(recipe)
    seen = survey(model)
    steps = tuple(select_layers(seen, step) for step in asked.steps)
    for selection in steps:
        _check_method(selection)
    made_with = {"sparsec": __version__, "torch": torch.__version__}
    resolved = asked.model_copy(update={"steps": tuple(s.step for s in steps), "made_with": made_with, "notes": ()})
    notes = dict.fromkeys([*asked.notes, *(note for step in steps for note in step.notes)])
    return Prepared(resolved, steps, tuple(notes), fingerprint(model))


def _check_method(selection: Selection) -> None:
    method = selection.step.method_object()
    if method.needs:
        raise BadRecipe(
            detail=f"method {selection.step.method} needs statistics of calibration data ({', '.join(method.needs)}), "
            "and this version runs only methods that need none"
        )
    if isinstance(method, Updates) and any(job.step.scope == "global" for job in selection.jobs):
        raise BadRecipe(
            detail=f"method {selection.step.method} updates weights layer by layer, so scope global has no meaning; "
            "use layer or row"
        )


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and some values of every tensor: tells models apart, cheap on any size."""
    parts: list[str | bytes] = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            continue
        parts.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}")
        if (
            type(tensor) is torch.Tensor
            and tensor.device.type != "meta"
            and tensor.layout is torch.strided
            and tensor.numel()
        ):
            places = torch.linspace(0, tensor.numel() - 1, min(_SAMPLED, tensor.numel())).long()
            index = torch.unravel_index(places.to(tensor.device), tensor.shape) if tensor.ndim else ()
            parts.append(tensor.detach()[index].double().cpu().numpy().tobytes())
    return digest(*parts)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``, whose names are those that the user knows."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def _rows(prepared: Prepared, tick: Callable[[int, int, str], None]) -> Iterator[PrunedLayer]:
    total, done = sum(len(step.jobs) for step in prepared.steps), 0
    for number, selection in enumerate(prepared.steps, 1):
        choosers = _choosers(selection.jobs)
        for job, stats in _walk(selection):
            tick(done, total, job.layer.name)
            try:
                row = _prune(job, stats, choosers[job], number)
            except BaseException:
                if done:
                    warnings.warn(
                        f"sparsify stopped at {job.layer.name}: {done} of {total} layers are pruned, the others are "
                        "as they were. Load the model again before another recipe.",
                        SparsecWarning,
                        stacklevel=3,
                    )
                raise
            done += 1
            yield row
    tick(done, total, "")


def _walk(selection: Selection) -> Iterator[tuple[Job, Statistics]]:
    """The order in which layers are pruned, each with the statistics that its method needs: here, none."""
    for job in selection.jobs:
        yield job, {}


def _choosers(jobs: list[Job]) -> dict[Job, Choose]:
    """A ``Choose`` for each job. Jobs of scope global with the same method, pattern and sparsity share a threshold."""
    choosers: dict[Job, Choose] = {}
    pools: dict[tuple[Any, MaskPattern, float], list[Job]] = {}
    for job in jobs:
        pattern, step = MaskPattern.parse(job.step.pattern), job.step
        method, sparsity = step.method_object(), float(step.sparsity or 0.0)
        if step.scope == "global" and pattern.sparsity is None:
            pools.setdefault((method, pattern, sparsity), []).append(job)
        else:
            choosers[job] = Selector(pattern, sparsity, str(step.scope), method.norm)
    for (method, pattern, sparsity), members in pools.items():
        selectors = select_pool([_scorer(method, job) for job in members], pattern, sparsity, norm=method.norm)
        choosers.update(zip(members, selectors, strict=True))
    return choosers


def _scorer(method: Scores, job: Job) -> Callable[[], torch.Tensor]:
    return lambda: _scored(method, job)


def _scored(method: Scores, job: Job) -> torch.Tensor:
    with torch.no_grad():
        return method.score(job.layer.matrix, {})


def _prune(job: Job, stats: Statistics, choose: Choose, number: int) -> PrunedLayer:
    """Make one layer's mask, then write it; gives its row of the report."""
    layer, step = job.layer, job.step
    inside = layer.weight.is_inference()  # such tensors may only be written in inference mode
    with torch.inference_mode(inside), torch.no_grad():
        weight = layer.matrix
        pruned = prune(step.method_object(), weight, stats, _finite(choose, layer.name))
        new = _written(weight, pruned)
        size = torch.linalg.vector_norm(weight, dtype=torch.float64).item()
        lost = torch.linalg.vector_norm(weight - new, dtype=torch.float64).item()
        weight.copy_(new)
        achieved = 1.0 - new.count_nonzero().item() / new.numel()
    return PrunedLayer(
        name=layer.name,
        kind=layer.kind,
        shape=layer.shape,
        method=step.method,
        pattern=step.pattern,
        scope=str(step.scope),
        asked=float(step.sparsity or 0.0),
        achieved=achieved,
        error=lost / size if size else 0.0,
        step=number,
        tied=layer.tied,
        notes=(*job.notes, *(("every weight of it is zero now",) if achieved == 1.0 else ())),
    )


def _written(weight: torch.Tensor, pruned: Pruned) -> torch.Tensor:
    """The new weight: kept values, and +0.0 (never -0.0) where the mask prunes."""
    values = weight if pruned.values is None else pruned.values.to(weight.dtype)
    return values.masked_fill(~pruned.keep, 0.0)


def _finite(choose: Choose, name: str) -> Choose:
    def checked(score: torch.Tensor, start: int = 0) -> torch.Tensor:
        if bool(score.isnan().any()):
            raise UnprunableLayer(name=name, why="its scores are not numbers", help="Check the calibration data.")
        return choose(score, start)

    return checked
