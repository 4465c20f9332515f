"""The machines that kernels are made for. In: a name a user typed. Out: a frozen ``Target`` of this machine.

A target is one file with one line in ``TARGETS``; its function takes what follows the colon in the name.
"""

from __future__ import annotations

import functools
import importlib
import os

from sparsec.errors import UnknownTarget, did_you_mean, listed
from sparsec.targets.base import Target

if __name__ != "sparsec.targets":  # one identity per class: see CONTRIBUTING, "layout"
    raise ImportError("import sparsec.targets, not targets")

# name -> (module:function, variants after the colon, one line for people)
TARGETS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "cpu": ("sparsec.targets.cpu:make", ("avx512", "avx2", "portable"), "this CPU, by the widest vectors it has"),
    "cuda": (
        "sparsec.targets.cuda:make",
        ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120"),
        "NVIDIA GPUs; with an architecture also where there is none, to compile kernels",
    ),
    "onnxruntime": ("sparsec.targets.onnxruntime:make", (), "ONNX Runtime on this CPU, with our kernels in it"),
    "reference": ("sparsec.targets.reference:make", (), "portable kernels, fixed costs: the same plan everywhere"),
}
DEFAULT = "cpu"  # what "auto" means where no weight says otherwise


def names() -> tuple[str, ...]:
    """Every name that ``resolve`` knows, most general first."""
    full = [name for base, (_, variants, _) in TARGETS.items() for name in (base, *(f"{base}:{v}" for v in variants))]
    return ("auto", *full)


def resolve(name: str) -> Target:
    """The target that a name means on this machine.

    Raises UnknownTarget, and BadOptionValue where this machine cannot run its code.
    """
    return _resolve(name, os.environ.get("SPARSEC_ISA", ""))


def for_weights(name: str, on_gpu: bool) -> Target:
    """``resolve``, where ``auto`` means the machine that the weights are on: the GPU where they are there."""
    return resolve("cuda" if name == "auto" and on_gpu else name)


@functools.lru_cache(maxsize=64)
def _resolve(name: str, isa: str) -> Target:
    if name not in names():
        raise UnknownTarget(name=name, nearest=did_you_mean(name, names()), known=listed(names()))
    base, _, variant = (DEFAULT if name == "auto" else name).partition(":")
    module, _, function = TARGETS[base][0].partition(":")
    target: Target = getattr(importlib.import_module(module), function)(variant)
    return target
