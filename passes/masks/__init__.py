"""Mask methods by name. To add one: its file in this folder (``contract.py`` says what it is) and a line here."""

from __future__ import annotations

import importlib
from typing import Any

from sparsec.errors import UnknownMethod, did_you_mean, listed

METHODS: dict[str, str] = {
    "sparsegpt": "sparsec.passes.masks.sparsegpt:SparseGPT",
    "proximal": "sparsec.passes.masks.proximal:Proximal",
    "pgb": "sparsec.passes.masks.pgb:PGB",
    "reconstruct": "sparsec.passes.masks.post.reconstruct:Reconstruct",
    "variance": "sparsec.passes.masks.post.variance:Variance",
    "barber": "sparsec.passes.masks.post.barber:Barber",
    "ebft": "sparsec.passes.masks.post.ebft:Ebft",
    "equalize": "sparsec.passes.reparam.equalize:Equalize",
    "permute": "sparsec.passes.reparam.permute:Permute",
    "magnitude": "sparsec.passes.masks.magnitude:Magnitude",
    "wanda": "sparsec.passes.masks.wanda:Wanda",
    "wanda-alpha": "sparsec.passes.masks.wanda:WandaAlpha",
    "ria": "sparsec.passes.masks.ria:RIA",
    "gblm": "sparsec.passes.masks.gblm:GBLM",
    "esparse": "sparsec.passes.masks.esparse:ESparse",
    "minillm": "sparsec.passes.masks.minillm:MiniLLM",
    "besa": "sparsec.passes.masks.allocate.besa:BESA",
    "owl": "sparsec.passes.masks.allocate.owl:OWL",
    "time": "sparsec.passes.masks.allocate.budget:Time",
    "uniform": "sparsec.passes.masks.allocate.uniform:Uniform",
    "rtn": "sparsec.passes.quantize.rtn:RTN",
    "smoothquant": "sparsec.passes.quantize.smoothquant:SmoothQuant",
    "teal": "sparsec.passes.gates.teal:TEAL",
    "cats": "sparsec.passes.gates.cats:CATS",
    "chess": "sparsec.passes.gates.chess:CHESS",
    "scap": "sparsec.passes.gates.scap:SCAP",
    "qsparse": "sparsec.passes.gates.qsparse:QSparse",
    "amber": "sparsec.passes.gates.amber:Amber",
    "sparseinfer": "sparsec.passes.gates.sparseinfer:SparseInfer",
    "dejavu": "sparsec.passes.gates.dejavu:DejaVu",
    "shadowllm": "sparsec.passes.gates.shadow:ShadowLLM",
    "coreinfer": "sparsec.passes.gates.coreinfer:CoreInfer",
    "first-activations": "sparsec.passes.gates.first:FirstActivations",
    "bonsai": "sparsec.passes.masks.structure.bonsai:Bonsai",
    "loraprune": "sparsec.passes.masks.structure.loraprune:LoraPrune",
    "slicegpt": "sparsec.passes.masks.structure.slicegpt:SliceGPT",
}


def method_class(name: str) -> type[Any]:
    """The dataclass registered under ``name``; imported now. Raises UnknownMethod."""
    if not isinstance(name, str) or name not in METHODS:
        raise UnknownMethod(name=name, nearest=did_you_mean(str(name), METHODS), known=listed(METHODS))
    module, _, attribute = METHODS[name].partition(":")
    found: type[Any] = getattr(importlib.import_module(module), attribute)
    return found
