"""The rows of the table of gates, and what papers say of them. In: METHODS. Out: rows and relations.

``SPARSITY%`` is the share of activations that a recipe asks for. ``(last half)``: the first half of each window is a
dense context, only the second is gated and scored, as TEAL's own code evaluates; ``(last half scored)``: all tokens are
gated, the same ones scored.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from benchmarks.accuracy.grid import Row, row
from benchmarks.accuracy.relations import Pair, Relation
from sparsec.passes.masks import METHODS
from sparsec.recipe_steps import role_of

LABELS = ("0%", "20%", "30%", "40%", "50%", "65%", "70%", "80%")
CURVES = ("teal", "cats", "chess", "scap")
_CURVE = ("20%", "30%", "40%", "50%", "65%", "80%")
_BOTH = ("causal", "encoder")


def share(label: str) -> float:
    return float(label.removesuffix("%")) / 100


def gates(method: str, label: str, **options: Any) -> dict[str, Any]:
    return {"method": method, "sparsity": share(label), **options}


def activation_grid() -> list[Row]:
    """Every row, most telling first. Gate methods that no row names get one at 50 % at the end."""
    rows = [*_curves(), *_modes(), *_others(), *_encoder()]
    named = {piece for r in rows for piece in r.pieces}
    late = [name for name in METHODS if role_of(name) == "gate" and name not in named]
    rows += [row(f"{name} 50%", 4, gates(name, "50%")) for name in late]
    return sorted(rows, key=lambda r: r.tier)


def _curves() -> Iterator[Row]:
    for label in _CURVE:
        for method in CURVES:
            models = (*_BOTH, "relu") if method == "cats" and label in ("50%", "80%") else _BOTH
            yield row(f"{method} {label}", 1, gates(method, label), models=models)


def _modes() -> Iterator[Row]:
    for label in ("50%", "65%"):
        yield row(f"teal(last half) {label}", 2, gates("teal", label), tokens="last-half", late=True)
        yield row(f"teal(last half scored) {label}", 2, gates("teal", label), late=True)
        yield row(f"qsparse {label}", 2, gates("qsparse", label), models=_BOTH)
    for label in ("50%", "80%"):
        yield row(f"chess(MLP) {label}", 2, gates("chess", label, attention=False))
        yield row(f"teal(down) {label}", 2, gates("teal", label, targets=["*down_proj"]))
    yield row("teal(greedy) 50%", 3, gates("teal", "50%", greedy=True))


def _others() -> Iterator[Row]:
    half: dict[str, Any] = {"tokens": "last-half", "late": True}
    yield row("amber 50%", 3, {"method": "amber"})
    yield row("amber(skip=0) 50%", 3, {"method": "amber", "skip": 0})
    yield row("dejavu 50%", 3, gates("dejavu", "50%"), models=("causal", "relu"))
    for method in ("coreinfer", "first-activations", "shadowllm"):
        yield row(f"{method}(last half) 50%", 3, gates(method, "50%"), models=("causal", "relu"), **half)
    yield row("cats(last half) 50%", 3, gates("cats", "50%"), models=("causal", "relu"), **half)
    for label in ("50%", "80%"):
        yield row(f"sparseinfer {label}", 3, gates("sparseinfer", label), models=("relu",))
    yield row("wanda+teal 50%", 3, {"method": "wanda", "sparsity": 0.5}, gates("teal", "50%"))


def _encoder() -> Iterator[Row]:
    for label in ("50%", "70%"):
        for mode in ("median", "kde"):
            yield row(f"scap({mode}) {label}", 1, gates("scap", label, mode=mode), models=("encoder",))
    yield row("teal 70%", 1, gates("teal", "70%"), models=("encoder",))


def activation_claims() -> list[Relation]:
    """What methods.md says holds, on which kind of model."""
    rising = [tuple(Pair(f"{m} {a}", f"{m} {b}") for a, b in itertools.pairwise(_CURVE)) for m in CURVES]
    less = "more zeros cost more"
    return [
        *(
            Relation(f"{m}: {' < '.join(_CURVE)}", less, pairs, hard=True)
            for m, pairs in zip(CURVES, rising, strict=True)
        ),
        Relation(
            "TEAL's evaluation of the last half flatters", "half of the context is dense",
            tuple(Pair(f"teal(last half) {x}", f"teal(last half scored) {x}") for x in ("50%", "65%")),
        ),
        Relation(
            "CHESS's thresholds of each channel ≤ CATS's one", "He et al., 2024",
            tuple(Pair(f"chess(MLP) {x}", f"cats {x}", "no more") for x in ("50%", "80%")),
        ),
        Relation(
            "inputs of down are the sparsest: gating them alone costs little", "earlier measurement",
            (Pair("teal(down) 80%", "teal 50%"), Pair("teal(down) 50%", "teal 50%")), hard=True,
        ),
        Relation(
            "top-k of each token = a threshold at 50 %", "earlier measurement",
            (Pair("qsparse 50%", "teal 50%", "same"),),
        ),
        Relation("top-k < a threshold at 65 %", "earlier measurement", (Pair("qsparse 65%", "teal 65%"),)),
        Relation("greedy shares < uniform ones", "Liu et al., 2024", (Pair("teal(greedy) 50%", "teal 50%"),)),
        Relation(
            "skipping sensitive layers helps Amber", "An et al., 2025", (Pair("amber 50%", "amber(skip=0) 50%"),)
        ),
        Relation(
            "centring on the median helps after GELU", "Chua et al., 2024",
            tuple(Pair(f"scap(median) {x}", f"teal {x}") for x in ("50%", "70%")), "encoder", hard=True,
        ),
        Relation(
            "centring on the peak of the density helps after GELU", "Chua et al., 2024",
            tuple(Pair(f"scap(kde) {x}", f"teal {x}") for x in ("50%", "70%")), "encoder",
        ),
    ]  # fmt: skip
