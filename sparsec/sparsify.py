"""``sparsify``: masks from a recipe, written into a model as exact zeros.

In: an ``nn.Module``, a recipe, and calibration data where the method needs it. Out: the same model, still plain
PyTorch, with zeros in its weights, and a ``Report``. Everything that can be wrong with the recipe for this model is
found by ``prepare`` before the first weight changes; then each layer's mask is complete before its weight is written.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsec import __version__
from sparsec.cache import digest
from sparsec.calibration import Calibrated, calibrate
from sparsec.calibration_fit import pairs_explained, taken_by
from sparsec.cli.common import progress as progress_bar
from sparsec.errors import BadOptionValue, BadRecipe, UnprunableLayer
from sparsec.journal import Journal, kept_until_done
from sparsec.passes.gates.forms import Centred
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.allocate.contract import Learns
from sparsec.passes.masks.contract import GRADIENTS, Updates
from sparsec.prunable import Job, Selection, select_layers, survey
from sparsec.recipe import Recipe
from sparsec.recipe_steps import Gates, Piece, Step, Values
from sparsec.rounding import noting
from sparsec.sparsify_patches import laid_in_patches, only_masks
from sparsec.sparsify_report import PrunedLayer, Report, counted
from sparsec.sparsify_run import Runner
from sparsec.sparsify_structure import restructure
from sparsec.stages import Stage, stages_of

__all__ = ["Prepared", "PrunedLayer", "Report", "execute", "methods", "prepare", "sparsify"]

DEFAULT_MEMORY = 4 << 30  # bytes of calibration activations kept in memory


@dataclass(frozen=True)
class Prepared:
    """A checked recipe for one model: what would be pruned, and how. Nothing has been written."""

    recipe: Recipe
    stages: tuple[tuple[Stage, Selection], ...]
    notes: tuple[str, ...]
    model: nn.Module

    @cached_property
    def model_sha(self) -> str:
        """Of the model as it is when this is first asked for; ``execute`` asks before it changes anything."""
        return fingerprint(self.model)

    @property
    def steps(self) -> tuple[Selection, ...]:
        return tuple(selection for _, selection in self.stages)

    @property
    def needs_data(self) -> bool:
        return any(stage.needs_data for stage, _ in self.stages)

    @property
    def jobs(self) -> list[tuple[int, Job]]:
        """Every (number of the step, job), in the order in which they run."""
        return [(number, job) for number, step in enumerate(self.steps, 1) for job in step.jobs]

    def to_dict(self, tokens: int | None = None, max_memory: int = DEFAULT_MEMORY) -> dict[str, Any]:
        """The forecast, as JSON types; see ``sparsec.forecast``. ``tokens``: of the calibration data, where known."""
        from sparsec.forecast import forecast

        return forecast(self, tokens, max_memory)


def sparsify(
    model: nn.Module,
    recipe: object,
    data: Any = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    max_memory: int = DEFAULT_MEMORY,
) -> Report:
    """Prune ``model`` in place: its weights get exact zeros, nothing else about it changes. Gives a ``Report``.

    ``recipe`` is a method name (``"sparsegpt"``), a dict (``{"method": "wanda", "sparsity": 0.7, "pattern": "2:4"}``),
    a list of steps, or a YAML, JSON or TOML file; see ``sparsec.recipe``. ``data`` is what methods that need
    calibration see: an iterable of input tensors, or of keyword dicts for the model's forward, or a text or JSONL
    file, for which ``tokenizer`` is needed. Weights of every floating dtype of 16 bits or more keep their dtype,
    device and identity; tied weights are pruned once.

    ``resume``: a folder where finished blocks are kept, so that the same call goes on after a kill, to the same bits;
    they are removed when all is done.
    ``max_memory``: bytes of calibration activations in memory; more goes to disk.

    Raises a RecipeError before any weight has changed when the recipe does not fit itself, the model or the data
    (unknown method, key or layer, impossible pattern, NaN weights, too little text). Should anything fail later, a
    SparsecWarning says after which layer; each layer is then either as it was or finished.
    """
    return execute(
        prepare(model, recipe), data, tokenizer=tokenizer, progress=progress, resume=resume, max_memory=max_memory
    )


def execute(
    prepared: Prepared,
    data: Any = None,
    *,
    tokenizer: Any = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    max_memory: int = DEFAULT_MEMORY,
    keep_journal: bool = False,
) -> Report:
    """Do what was prepared: write the masks into the model that it was prepared for.

    ``data`` may be what ``calibrated_for`` gave. ``keep_journal``: what ``resume`` holds stays when all is done, for
    callers that have yet to save the model.
    """
    if max_memory < 0:
        raise BadOptionValue(key="max_memory", value=max_memory, expected="it is a number of bytes, 0 or more")
    started = time.perf_counter()
    recipe, notes = prepared.recipe, list(prepared.notes)
    samples: list[dict[str, Any]] = []
    model_sha, data_sha = prepared.model_sha, ""
    if prepared.needs_data:
        calibrated = data if isinstance(data, Calibrated) else calibrated_for(prepared, data, tokenizer)
        samples, data_sha = calibrated.samples, calibrated.sha
        notes += calibrated.notes
        recipe = recipe.model_copy(update={"made_with": {**recipe.made_with, "data": data_sha}})
    elif data is not None:
        notes.append("data was not read: no step of this recipe needs calibration")
    journal = None
    if resume is not None:
        about = {"model": model_sha, "recipe": recipe.sha, "data": data_sha}
        journal = Journal(Path(resume), digest(*about.values()), about)
    structured = None
    with (
        noting(prepared.model),
        kept_until_done(journal, keep_journal),
        laid_in_patches(prepared.model, (job for _, selection in prepared.stages for job in selection.jobs)),
        taken_by(prepared.model, samples),
        progress_bar("sparsify", quiet=not progress) as tick,
    ):
        if (step := prepared.stages[0][0].structure) is not None:
            structured = restructure(prepared.model, step, samples, recipe.seed, tick)
        runner = Runner(prepared.model, recipe, prepared.stages, samples, tick, journal, max_memory)
        rows = tuple(runner.rows())
    notes += runner.notes
    if journal and journal.taken:
        notes.append(f"{counted(journal.taken, 'block')} came from the unfinished run in {str(resume)!r}")
    seconds = time.perf_counter() - started
    return Report(recipe, rows, tuple(dict.fromkeys(notes)), seconds, model_sha, structured, tuple(runner.gates))


def calibrated_for(prepared: Prepared, data: Any, tokenizer: Any) -> Calibrated:
    """The calibration samples of a recipe that needs them. Raises BadRecipe where there are none."""
    settings = prepared.recipe.calibration
    said = settings.dataset if data is None else data
    if said is None:
        needy = next(p.method for stage, _ in prepared.stages for p in stage.pieces if stage.needs_data)
        raise BadRecipe(
            detail=f"{needy} needs calibration data; pass data=... (--data FILE), or name a text file as "
            "calibration.dataset"
        )
    # few tokens harm statistics of pairs of inputs; a recipe without them needs no such warning
    pairs = any(_pairs(piece) for stage, _ in prepared.stages for piece in stage.pieces)
    with pairs_explained():
        return calibrate(said, settings, prepared.model, tokenizer, widest=None if pairs else 0)


def _pairs(piece: Piece) -> bool:
    method = piece.method_object()
    return "xxt" in method.needs or (isinstance(method, Updates) and piece.role != "quantize")


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
    stages = []
    planned = stages_of(asked.steps, asked.allow_quantize_first)
    for stage in planned:
        if stage.mask is None:
            stages.append((stage, _alone(stage, len(planned))))
            continue
        selection = only_masks(stage, select_layers(seen, stage.mask))
        _check_scope(stage, selection)
        _check_tensors(stage, selection)
        _check_needs(stage, selection)
        _check_gates(stage, selection, model)
        mask = selection.step
        assert isinstance(mask, (Step, Values, Gates))
        stages.append((replace(stage, mask=mask), selection))
    made_with = {"sparsec": __version__, "torch": torch.__version__}
    steps = tuple(piece for stage, _ in stages for piece in stage.pieces)
    resolved = asked.model_copy(update={"steps": steps, "made_with": made_with, "notes": ()})
    notes = dict.fromkeys([*asked.notes, *(note for _, selection in stages for note in selection.notes)])
    return Prepared(resolved, tuple(stages), tuple(notes), model)


def _alone(stage: Stage, stages: int) -> Selection:
    """The empty selection of a structured step. Raises BadRecipe where masks are asked for in the same recipe."""
    step = stage.structure
    assert step is not None
    if stages > 1:
        raise BadRecipe(
            detail=f"{step.method} changes the shapes of layers, so it stands alone; prune its result by another recipe"
        )
    return Selection(step)


def _check_scope(stage: Stage, selection: Selection) -> None:
    """Scope global compares the scores of all layers at once, which walking block by block never has."""
    assert stage.mask is not None
    walks = stage.walks or isinstance(stage.mask.method_object(), Updates)
    if walks and any(job.step.scope == "global" for job in selection.jobs):
        raise BadRecipe(
            detail=f"method {stage.mask.method} goes layer by layer here, so scope global has no meaning; "
            "use layer or row, and owl to spread the sparsity"
        )


def _check_needs(stage: Stage, selection: Selection) -> None:
    """Whether a step is calibrated is decided for the whole step: an override may not need more."""
    assert stage.mask is not None
    known = set(stage.mask.method_object().needs)
    for job in selection.jobs:
        if missing := set(job.step.method_object().needs) - known:
            raise BadRecipe(
                detail=f"the override of {job.layer.name} needs calibration ({', '.join(sorted(missing))}), and "
                f"{stage.mask.method} does not; say it for the whole step, and override the other layers"
            )


def _check_gates(stage: Stage, selection: Selection, model: nn.Module) -> None:
    """A gate that no layer has room for, and weights that the gates of an earlier call were made for."""
    for job in selection.jobs:
        fits = getattr(job.step.method_object(), "fits", None)
        if fits is not None:
            fits(job.layer.name, job.layer.shape)
        gate = getattr(model.get_submodule(job.layer.name), "gate", None)
        if isinstance(gate, Centred):
            raise BadRecipe(
                detail=f"{job.layer.name} was gated by a shift that its bias holds, which fits its weight as it is; "
                "load the model again, and put the gates last"
            )


def _check_tensors(stage: Stage, selection: Selection) -> None:
    """Weights of inference mode take no gradients, and only plain copies of new values."""
    made = next((job.layer.name for job in selection.jobs if job.layer.weight.is_inference()), None)
    needy = next((piece.method for piece in stage.pieces if _learns_or_folds(piece)), None)
    if made is not None and needy is not None:
        raise UnprunableLayer(
            name=made,
            why=f"it was made in inference mode, where {needy} can neither learn nor fold",
            help="Load the model outside torch.inference_mode.",
        )


def _learns_or_folds(piece: Piece) -> bool:
    method = piece.method_object()
    learns = isinstance(method, Learns) or getattr(method, "trains", False) or set(method.needs) & set(GRADIENTS)
    return piece.role == "reparam" or hasattr(method, "folds") or bool(learns)


def fingerprint(model: nn.Module) -> str:
    """A hash of names, shapes, dtypes and every byte of every tensor: about a second for each GB."""
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
            # one tensor at a time, and hashed where it lies: what is on the CPU and contiguous is not copied
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            parts.append(hashlib.blake2b(data.data, digest_size=16).digest())
    return digest(*parts)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile(module)``, whose names are those that the user knows."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model
