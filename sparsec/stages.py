"""A recipe's steps as stages: each one mask method with what goes before and after it. Illegal orders are refused here.

reparam*  allocate?  mask  post*          structure  alone          reparam*  quantize  after all masks
gate  after everything else
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sparsec.errors import BadRecipe
from sparsec.passes.masks.contract import Updates
from sparsec.passes.masks.pattern import MaskPattern
from sparsec.passes.reparam.contract import Reparam
from sparsec.recipe_steps import DEFAULT_SPARSITY, Gates, Piece, Spread, Step, Values


@dataclass(frozen=True)
class Stage:
    """One walk over the model. ``mask``: its mask method or, alone, a value or gate method; ``structure`` has none."""

    mask: Step | Values | Gates | None
    reparams: tuple[Piece, ...] = ()
    allocate: Spread | None = None
    posts: tuple[Piece, ...] = ()
    structure: Spread | None = None

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All steps in the order in which they act."""
        before = (*self.reparams, *([self.allocate] if self.allocate else []))
        middle = [step for step in (self.structure, self.mask) if step]
        return (*before, *middle, *self.posts)

    @property
    def rewrites(self) -> tuple[tuple[str, Reparam], ...]:
        """(step, rewrite) in order: the steps that are one, then what the value method folds by itself."""
        own = getattr(self.mask.method_object(), "folds", None) if self.mask else None
        said = tuple((piece.method, piece.method_object()) for piece in self.reparams)
        return (*said, *([(self.mask.method, own)] if self.mask and own else []))

    @property
    def needs_data(self) -> bool:
        return self.structure is not None or any(piece.method_object().needs for piece in self.pieces)

    @property
    def walks(self) -> bool:
        """Whether it goes block by block, not layer by layer."""
        return self.needs_data or len(self.pieces) > 1


def stages_of(steps: Sequence[Piece], quantize_first: bool = False) -> tuple[Stage, ...]:
    """Raises BadRecipe for an order that means nothing, in a sentence.

    ``quantize_first``: masks may come after a value method. Zeros chosen among rounded weights cost more than rounding
    the weights that are left (Harma et al., "Effective Interplay between Sparsity and Quantization", 2024).
    """
    if not quantize_first:
        _sparsified_first(steps)
    _kept_on_grids(steps)
    _gated_last(steps)
    found: list[Stage] = []
    reparams: list[Piece] = []
    allocate: Spread | None = None
    for step in steps:
        waiting = _names(reparams, allocate)
        if step.role == "post":
            found[-1:] = [_followed(found, step, waiting)]
        elif step.role == "structure":
            if waiting:
                raise BadRecipe(detail=f"{step.method} removes heads and neurons, so {waiting} has no use before it")
            assert isinstance(step, Spread)
            found.append(Stage(None, structure=step))
        elif step.role == "reparam":
            if allocate:
                raise BadRecipe(detail=f"{step.method} changes what {allocate.method} has measured; put it first")
            reparams.append(step)
        elif step.role == "quantize":
            if allocate:
                raise BadRecipe(detail=f"{allocate.method} spreads a sparsity, and {step.method} has none; drop it")
            assert isinstance(step, Values)
            found.append(Stage(step, tuple(reparams)))
            reparams = []
        elif step.role == "gate":
            if waiting:
                raise BadRecipe(detail=f"{waiting} changes weights, and {step.method} has none to change; drop it")
            assert isinstance(step, Gates)
            found.append(Stage(step))
        elif step.role == "allocate":
            if allocate:
                raise BadRecipe(detail=f"{allocate.method} and {step.method} both allocate; keep one of them")
            assert isinstance(step, Spread)
            allocate = step
        else:
            assert isinstance(step, Step)
            found.append(Stage(_allocated(step, allocate), tuple(reparams), allocate))
            reparams, allocate = [], None
    if waiting := _names(reparams, allocate):
        raise BadRecipe(detail=f"{waiting} must be followed by the step of a mask method")
    return tuple(found)


def _sparsified_first(steps: Sequence[Piece]) -> None:
    first = next((i for i, step in enumerate(steps) if step.role == "quantize"), len(steps))
    late = next((step for step in steps[first + 1 :] if step.role in ("mask", "structure")), None)
    if late is not None:
        raise BadRecipe(
            detail=f"{late.method} comes after {steps[first].method}, and pruning quantised weights costs more than "
            f"quantising pruned ones; put {late.method} first, or say allow_quantize_first: true"
        )


def _kept_on_grids(steps: Sequence[Piece]) -> None:
    """What moves the weights that stay may not end a recipe that has put them on a grid."""
    last = max((i for i, step in enumerate(steps) if step.role == "quantize"), default=len(steps))
    for step in steps[last + 1 :]:
        if step.role == "post" or (step.role == "mask" and isinstance(step.method_object(), Updates)):
            raise BadRecipe(
                detail=f"{step.method} moves the weights that stay, off the grid that {steps[last].method} has put "
                f"them on; put {steps[last].method} after it, or use a method that only chooses, such as wanda"
            )


def _gated_last(steps: Sequence[Piece]) -> None:
    first = next((i for i, step in enumerate(steps) if step.role == "gate"), len(steps))
    late = next((step for step in steps[first + 1 :] if step.role != "gate"), None)
    if late is not None:
        raise BadRecipe(
            detail=f"{late.method} comes after {steps[first].method}, whose gates are calibrated for the weights as "
            f"they are; put {late.method} first"
        )


def _followed(found: list[Stage], step: Piece, waiting: str) -> Stage:
    if not found or not isinstance(found[-1].mask, Step) or waiting:
        raise BadRecipe(detail=f"{step.method} works on masks: put it after the step of a mask method")
    last = found[-1]
    return Stage(last.mask, last.reparams, last.allocate, (*last.posts, step))


def _names(reparams: Sequence[Piece], allocate: Piece | None) -> str:
    return " and ".join(piece.method for piece in (*reparams, *([allocate] if allocate else [])))


def _allocated(step: Step, allocate: Spread | None) -> Step:
    """The mask step with the sparsity of its allocator, where only that says one."""
    if allocate is None:
        return step
    pattern = MaskPattern.parse(step.pattern)
    if pattern.kind == "vnm":
        raise BadRecipe(detail=f"{allocate.method} gives each layer its own sparsity, and {pattern} has only one")
    method = allocate.method_object()
    if pattern.kind != "unstructured" and getattr(method, "per", "layer") == "row":
        raise BadRecipe(
            detail=f"{allocate.method} learns a sparsity for each row, which {pattern} cannot hold; say per: layer"
        )
    if pattern.kind == "nm" and getattr(method, "keeps", "mean") == "time":
        raise BadRecipe(
            detail=f"{allocate.method} sets shares that N of {pattern} can only come near; use unstructured"
        )
    if step.scope == "global":
        raise BadRecipe(detail=f"{allocate.method} gives each layer its own sparsity; scope global would overrule it")
    if allocate.sparsity is None:
        return step
    if pattern.sparsity is not None:
        if abs(pattern.sparsity - allocate.sparsity) > 1e-6:
            raise BadRecipe(
                detail=f"{allocate.method} asks for sparsity {allocate.sparsity:g}, and {pattern} means "
                f"{pattern.sparsity:g}; drop one of the two"
            )
        return step
    if "sparsity" in step.model_fields_set and step.sparsity not in (allocate.sparsity, DEFAULT_SPARSITY):
        raise BadRecipe(
            detail=f"{allocate.method} asks for sparsity {allocate.sparsity:g}, {step.method} for {step.sparsity:g}; "
            "give one of them"
        )
    return step.model_copy(update={"sparsity": allocate.sparsity})
