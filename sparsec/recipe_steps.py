"""The steps of a recipe: what every step has, and what those of each role add.

In: the dict of one step. Out: a frozen pydantic object whose fields are the keys of its role and the options of its
method, checked. ``step_class(name)`` makes the class of one method from the fields of its dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from sparsec.errors import BadRecipe, SparsecError, UnknownRecipeKey, did_you_mean, listed
from sparsec.passes.masks import METHODS, method_class
from sparsec.passes.masks.outliers import Outliers
from sparsec.passes.masks.pattern import MaskPattern

if TYPE_CHECKING:
    from typing_extensions import Self

SKIP = "skip"
DEFAULT_SPARSITY = 0.5


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Piece(Frozen):
    """A step that changes what a mask step left (``post``) or will find (``reparam``); the base of all steps."""

    method: str

    def method_object(self) -> Any:
        """The method with this step's options."""
        cls = method_class(self.method)
        return cls(**{f.name: getattr(self, f.name) for f in fields(cls)})

    @property
    def role(self) -> str:
        """``mask``, ``allocate``, ``post``, ``reparam``, ``quantize``, ``gate`` or ``structure``."""
        return role_of(self.method)

    def filled(self) -> Self:
        """With every default as it will be used."""
        return self


class Spread(Piece):
    """A step that spreads a sparsity over the layers of the mask step after it, or over heads and neurons."""

    sparsity: float | None = Field(default=None, ge=0, lt=1, description="mean share that goes; null: 0.5")


class Layers(Piece):
    """A step over a set of layers; the base of mask and value methods."""

    targets: tuple[str, ...] | None = Field(default=None, description="layers to take; null: every prunable layer")
    ignore: tuple[str, ...] | None = Field(default=None, description="layers to leave; null: the output head; []: none")
    overrides: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict, description="layers (same spellings) -> other settings, or skip"
    )
    overridable: ClassVar[tuple[str, ...]] = ()  # besides the method's own options

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _entries(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("overrides", mode="before")
    @classmethod
    def _skips(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        return {k: None if v is None or v is False or v == SKIP else v for k, v in value.items()}

    def overridden(self, entry: str) -> Self | None:
        """The settings of the layers that ``entry`` of ``overrides`` decides for; None: they are skipped."""
        changes = self.overrides[entry]
        if changes is None:
            return None
        known = (*self.overridable, *(f.name for f in fields(method_class(self.method))))
        changes = known_keys(changes, known, f"overrides[{entry!r}]")
        base = {**self.model_dump(exclude={"overrides"}), **self.freed(changes)}
        made: Self = validated(type(self), {**base, **changes}, f"overrides[{entry!r}]")
        return made.filled()

    def freed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Settings that ``changes`` make void."""
        return {}


class Values(Layers):
    """One value method over a set of layers: their weights go to a grid, and no mask changes."""

    sparsity: ClassVar[float] = 0.0
    pattern: ClassVar[str] = "unstructured"
    scope: ClassVar[str] = "layer"
    outliers: ClassVar[str | None] = None

    @property
    def grid(self) -> str:
        """What the weights become, as tables say it: ``int4, group 64``."""
        bits, group = getattr(self, "bits", None), getattr(self, "group", 0)
        if bits is None:
            return "its own values"
        even = "" if getattr(self, "symmetric", True) else ", asymmetric"
        how = {"int8": ", x int8", "int8-static": ", x int8 static"}.get(getattr(self, "activations", "none"), "")
        return f"int{bits}, {f'group {group}' if group else 'row'}{even}{how}"


class Gates(Layers):
    """One gate method over a set of layers: activations become zero at run time, and no weight does."""

    overridable: ClassVar[tuple[str, ...]] = ("sparsity",)
    scope: ClassVar[str] = "layer"
    outliers: ClassVar[str | None] = None

    sparsity: float | None = Field(default=None, ge=0, lt=1, description="share of activations that go; null: 0.5")
    phase: Literal["all", "decode", "prefill"] | None = Field(
        None, description="calls that are gated: all, with one token a sequence, with more; null: the method's"
    )

    @property
    def grid(self) -> str:
        """What is gated, as tables say it."""
        when = "" if self.phase in (None, "all") else f", {self.phase}"
        return f"activations{when}"

    def filled(self) -> Self:
        """With ``sparsity`` and ``phase`` as they will be used. Raises BadRecipe where options contradict it."""
        method = self.method_object()
        asks = getattr(method, "asks", None)
        said = asks(self.sparsity) if asks else DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        phase = self.phase or getattr(method, "phase", "all")
        return self.model_copy(update={"sparsity": said, "phase": phase})


class Step(Layers):
    """One mask method over a set of layers. Each method's own class adds its options."""

    overridable: ClassVar[tuple[str, ...]] = ("sparsity", "pattern", "scope", "outliers")

    sparsity: float | None = Field(default=None, ge=0, lt=1, description="share that goes; N:M fixes it, else 0.5")
    pattern: str = Field(default="unstructured", description="unstructured, N:M (keep N of M), V:N:M or block:RxC")
    scope: Literal["layer", "global", "row"] | None = Field(
        None, description="where weights compete: each layer, all layers of the step, or each row; null: the method's"
    )
    outliers: str | None = Field(
        default=None, description="kept beside the quota: k:M of each M in-features of a row, or a share such as 0.005"
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _pattern(cls, value: object) -> str:
        return str(MaskPattern.parse(value))

    @field_validator("outliers", mode="before")
    @classmethod
    def _outliers(cls, value: object) -> str | None:
        found = Outliers.parse(value)
        return None if found is None else str(found)

    def freed(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """2:4 brings its own sparsity with it, and leaves none behind."""
        if "pattern" not in changes or "sparsity" in changes:
            return {}
        return {"sparsity": self.sparsity if MaskPattern.parse(changes["pattern"]).sparsity is None else None}

    def filled(self) -> Self:
        """With ``sparsity`` and ``scope`` as they will be used. Raises BadRecipe where pattern and sparsity differ."""
        fixed = MaskPattern.parse(self.pattern).sparsity
        only = getattr(method_class(self.method), "patterns", (self.pattern,))
        if self.pattern not in only:
            raise BadRecipe(detail=f"{self.method} makes {' and '.join(only)} only, and the pattern is {self.pattern}")
        if aside := Outliers.parse(self.outliers):
            aside.check(MaskPattern.parse(self.pattern))
            if hasattr(method_class(self.method), "patterns"):
                raise BadRecipe(
                    detail=f"{self.method} makes {' and '.join(only)} only, and outliers {aside} stay beside that; "
                    "drop outliers, or take another method"
                )
        if fixed is not None and self.sparsity is not None and abs(fixed - self.sparsity) > 1e-6:
            raise BadRecipe(
                detail=f"pattern {self.pattern} means sparsity {fixed:g}, but sparsity is {self.sparsity:g}; "
                "drop one of the two (pattern: unstructured takes any sparsity)"
            )
        said = DEFAULT_SPARSITY if self.sparsity is None else self.sparsity
        scope = self.scope or method_class(self.method).scope
        return self.model_copy(update={"sparsity": said if fixed is None else fixed, "scope": scope})


_BASES: dict[str, type[Piece]] = {
    "mask": Step, "allocate": Spread, "structure": Spread, "post": Piece, "reparam": Piece, "quantize": Values,
    "gate": Gates,
}  # fmt: skip


def pattern_of(step: Layers) -> str:
    """The pattern of a step; what a gate method calls so is of activations, and no less a pattern."""
    return str(getattr(step, "pattern", "unstructured"))


def role_of(method: str) -> str:
    """What a method does in a recipe. Raises UnknownMethod."""
    return str(method_class(method).role)


def step_class(method: str) -> type[Piece]:
    """The pydantic class of one method's step. Raises UnknownMethod."""
    method_class(method)
    return _step_class(method, METHODS[method])  # by home as well: a name may be registered anew


@cache
def _step_class(method: str, home: str) -> type[Piece]:
    cls = method_class(method)
    hints = get_type_hints(cls, include_extras=True)
    options: dict[str, Any] = {}
    for f in fields(cls):
        default = f.default if f.default is not MISSING else ...
        description = f.metadata.get("doc")
        if f.default_factory is not MISSING:
            options[f.name] = (hints[f.name], Field(default_factory=f.default_factory, description=description))
        else:
            options[f.name] = (hints[f.name], Field(default, description=description))
    options["method"] = (Literal.__getitem__(method), ...)  # Literal[method] of a name known only now
    return create_model(f"{cls.__name__}Step", __base__=_BASES[cls.role], __doc__=cls.__doc__, **options)


def known_keys(
    said: Mapping[Any, Any], known: Sequence[str] | Mapping[str, Any], where: str, shown: Sequence[str] = ()
) -> dict[str, Any]:
    """``said`` itself, when all its keys are known. Raises UnknownRecipeKey with the nearest."""
    names = list(shown or known)
    for key in said:
        if key not in known:
            raise UnknownRecipeKey(key=key, nearest=did_you_mean(str(key), names), where=where, known=listed(names))
    return dict(said)


def validated(cls: type[Any], said: Mapping[str, Any], where: str) -> Any:
    try:
        return cls.model_validate(dict(said))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raised = first.get("ctx", {}).get("error")
        if isinstance(raised, SparsecError):  # a validator of ours that knows better words
            raise raised from None
        place = ".".join(str(part) for part in first["loc"])
        subject = f"{place} of {where}" if place else where
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
        raise BadRecipe(detail=f"{subject} is {first['input']!r}, but must be {message}") from None
