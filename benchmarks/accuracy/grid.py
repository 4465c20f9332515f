"""The rows of the table: a name, a recipe, and how soon it is worth its time. In: METHODS. Out: rows, in order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.accuracy.control import RANDOM
from sparsec.passes.masks import METHODS, method_class
from sparsec.recipe import Recipe
from sparsec.recipe_steps import role_of

BASIC = ("magnitude", "wanda", "sparsegpt", "ria")
SPARSITIES = {"50%": 0.5, "60%": 0.6, "70%": 0.7, "75%": 0.75}


@dataclass(frozen=True)
class Row:
    """``name`` is its place in the table, "method" and "pattern" of it parted by a space.

    ``tier``: 1 is measured first. ``samples``: calibration segments, where they are not the run's. ``planted``: the
    model has outlier channels of this factor planted that change no output. ``models``: kinds it is measured on.
    ``tokens``: of each window that gates act on, ``late``: only the last half is scored (``activations.py``).
    """

    name: str
    recipe: Mapping[str, Any]
    tier: int
    samples: int | None = None
    planted: float = 0.0
    models: tuple[str, ...] = field(default=("causal",))
    tokens: str = "all"
    late: bool = False

    @property
    def pieces(self) -> list[str]:
        """The methods of its steps."""
        return [str(step["method"]) for step in self.recipe["steps"]]

    @property
    def draws_differ(self) -> bool:
        """Whether another calibration draw (or seed, of the random control) gives another model."""
        return RANDOM in self.pieces or any(getattr(method_class(name), "needs", ()) for name in self.pieces)


def amount(label: str) -> dict[str, Any]:
    """``50%`` -> sparsity, ``2:4`` -> pattern."""
    return {"sparsity": SPARSITIES[label]} if label in SPARSITIES else {"pattern": label}


def row(
    name: str, tier: int, *steps: Mapping[str, Any] | str, top: Mapping[str, Any] | None = None, **more: Any
) -> Row:
    made = [{"method": step} if isinstance(step, str) else dict(step) for step in steps]
    return Row(name, {**(top or {}), "steps": made}, tier, **more)


def mask(method: str, label: str, **options: Any) -> dict[str, Any]:
    return {"method": method, **amount(label), **options}


def grid() -> list[Row]:
    """Every row, most telling first within its tier. Methods that no row names get one at 50 % (or 2:4) at the end."""
    rows = [*_first(), *_second(), *_third(), *_fourth()]
    named = {piece for r in rows for piece in r.pieces}
    rows += [r for name in METHODS if name not in named for r in _unnamed(name)]
    return sorted(rows, key=lambda r: r.tier)


def _first() -> Iterator[Row]:
    both = ("causal", "encoder")
    yield row("random 50%", 1, mask(RANDOM, "50%"), models=both)
    for label in ("50%", "70%", "2:4", "8:16"):
        for method in BASIC:
            yield row(f"{method} {label}", 1, mask(method, label), models=both)


def _second() -> Iterator[Row]:
    both = ("causal", "encoder")
    for method in ("wanda", "sparsegpt"):
        owl = {"method": "owl", "sparsity": 0.7}
        yield row(f"owl+{method} 70%", 2, owl, mask(method, "70%"), models=both)
    yield row(
        "owl(flat=1)+wanda 70%", 2, {"method": "owl", "sparsity": 0.7, "flat": 1.0}, mask("wanda", "70%"), models=both
    )
    for label in ("2:4", "70%"):
        yield row(f"wanda+variance {label}", 2, mask("wanda", label), "variance", models=both)
        yield row(f"wanda+reconstruct {label}", 2, mask("wanda", label), "reconstruct", models=both)
    for method in ("wanda", "magnitude"):
        yield row(f"{method}+barber(10%) 70%", 2, mask(method, "70%"), {"method": "barber", "ratio": 0.1})
    for label in ("50%", "70%"):
        for size in (128, 16):
            yield row(f"sparsegpt(blocksize={size}) {label}", 2, mask("sparsegpt", label, blocksize=size))
    for samples in (1, 8):
        for method in ("wanda", "sparsegpt"):
            yield row(f"{method}(segments={samples}) 50%", 2, mask(method, "50%"), samples=samples)


def _third() -> Iterator[Row]:
    yield row("gblm 50%", 3, mask("gblm", "50%"))
    yield row("gblm 70%", 3, mask("gblm", "70%"))
    for label in ("4:8", "60%"):
        for method in BASIC:
            yield row(f"{method} {label}", 3, mask(method, label))
    for count in (4, 8, 16):
        yield row(f"wanda(outliers={count}:256) 2:4", 3, mask("wanda", "2:4", outliers=f"{count}:256"))
    for method in ("wanda", "sparsegpt"):
        for label in ("50%", "70%"):
            top = {"propagate_error": False}
            yield row(f"{method}(dense inputs) {label}", 3, mask(method, label), top=top)
    for method in ("wanda", "sparsegpt", "magnitude"):
        yield row(f"{method}(planted) 50%", 3, mask(method, "50%"), planted=32.0)
    for label in ("2:4", "8:16"):
        yield row(f"equalize+ria {label}", 3, "equalize", mask("ria", label))
    per_layer = {"method": "variance", "per": "layer"}
    for label in ("2:4", "70%"):
        yield row(f"wanda+variance(layer) {label}", 3, mask("wanda", label), per_layer)


def _fourth() -> Iterator[Row]:
    yield row("wanda 75%", 4, mask("wanda", "75%"))
    for method in ("wanda", "sparsegpt"):
        yield row(f"{method} 64:2:8", 4, mask(method, "64:2:8"))
    for method in ("esparse", "wanda-alpha", "minillm"):
        yield row(f"{method} 50%", 4, mask(method, "50%"))
    for label in ("50%", "70%"):
        yield row(f"besa+wanda {label}", 4, {"method": "besa", **amount(label)}, mask("wanda", label))
    yield row("permute+ria 2:4", 4, "permute", mask("ria", "2:4"))
    yield row("proximal 2:4", 4, mask("proximal", "2:4"))
    yield row("wanda+ebft 70%", 4, mask("wanda", "70%"), "ebft")
    yield row("wanda+barber 70%", 4, mask("wanda", "70%"), "barber")
    for bits, label in ((4, "50%"), (3, "50%"), (3, "2:4")):
        grid_step = {"method": "rtn", "bits": bits}
        yield row(f"wanda+rtn({bits} bits) {label}", 4, mask("wanda", label), grid_step)
        first = {"allow_quantize_first": True}
        yield row(f"rtn({bits} bits)+wanda {label}", 4, grid_step, mask("wanda", label), top=first)
    whole = {"method": "rtn", "bits": 8, "activations": "int8"}
    for planted, kind in ((0.0, ""), (32.0, "(planted)")):
        yield row(f"wanda+rtn(W8A8){kind} 50%", 5, mask("wanda", "50%"), whole, planted=planted)
        yield row(f"wanda+smoothquant{kind} 50%", 5, mask("wanda", "50%"), "smoothquant", planted=planted)
    exact = {"method": "reconstruct", "exact": True}
    yield row("wanda+reconstruct(exact) 2:4", 5, mask("wanda", "2:4"), exact)
    yield row("time+wanda 50%", 5, {"method": "time", "sparsity": 0.5}, mask("wanda", "50%"))


def _unnamed(name: str) -> Iterator[Row]:
    role = role_of(name)
    if role == "mask":
        yield row(f"{name} 50%", 6, mask(name, "50%"))
    elif role == "allocate":
        yield row(f"{name}+wanda 50%", 6, {"method": name, "sparsity": 0.5}, mask("wanda", "50%"))
    elif role == "post":
        yield row(f"wanda+{name} 50%", 6, mask("wanda", "50%"), name)
    elif role == "reparam":
        yield row(f"{name}+ria 2:4", 6, name, mask("ria", "2:4"))


def bits(recipe: Recipe) -> float:
    """Bits a pruned weight takes as fp16 values and positions in the leanest fixed code, outliers counted twice over.

    Values of a quantising step take its bits, its scales left out. Unstructured: 16 d + 1 (bitmap). N:M: 16 N/M and
    the group's number, ceil(log2 C(M, N)) / M. V:N:M: four of M columns a block besides 2 of 4. k:256 outliers: what
    N:M keeps, and k/256 (16 + 8) for value and column on top.
    """
    from math import ceil, comb, log2

    from sparsec.passes.masks.outliers import Outliers
    from sparsec.passes.masks.pattern import MaskPattern
    from sparsec.recipe_steps import Step

    step = next((s for s in recipe.steps if isinstance(s, Step)), None)
    if step is None:
        return 16.0  # gates leave weights as they are
    pattern, aside = MaskPattern.parse(step.pattern), Outliers.parse(step.outliers)
    kept = 1 - float(step.sparsity or 0.0)
    if pattern.kind == "nm":
        n, m = pattern.params
        position = ceil(log2(comb(m, n))) / m
    elif pattern.kind == "vnm":
        v, n, m = pattern.params
        position = ceil(log2(comb(m, 4))) / (v * m) + ceil(log2(comb(4, n))) / m
    else:
        position = 1.0 if pattern.kind == "unstructured" else 0.0
    width = next((float(getattr(s, "bits", 16)) for s in recipe.steps if s.role == "quantize"), 16.0)
    extra = 0.0
    if aside is not None:
        extra = (aside.count / aside.width if aside.width else aside.share) * 24
    return width * kept + position + extra
