"""sparsec: the sparsity compiler for PyTorch.

``torch.compile(model, backend="sparsec")`` needs no import of this package; the functions below are the
front: prune a model, explain a decision, tune, save. Importing sparsec imports nothing heavy, torch included.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsec.calibrate import calibrate
    from sparsec.explain import Explanation, explain
    from sparsec.export_onnx import export_onnx
    from sparsec.io import load, save
    from sparsec.pack import pack_, unpack_
    from sparsec.rounding import restore
    from sparsec.runtime.store import invalidate
    from sparsec.sparsify import Report, methods, sparsify
    from sparsec.tune_model import tune

__version__ = "0.1.0"

_HOME = {
    "Explanation": "sparsec.explain",
    "Report": "sparsec.sparsify",
    "calibrate": "sparsec.calibrate",
    "explain": "sparsec.explain",
    "export_onnx": "sparsec.export_onnx",
    "invalidate": "sparsec.runtime.store",
    "load": "sparsec.io",
    "methods": "sparsec.sparsify",
    "pack_": "sparsec.pack",
    "restore": "sparsec.rounding",
    "save": "sparsec.io",
    "sparsify": "sparsec.sparsify",
    "tune": "sparsec.tune_model",
    "unpack_": "sparsec.pack",
}

__all__ = [
    "Explanation",
    "Report",
    "__version__",
    "calibrate",
    "explain",
    "export_onnx",
    "invalidate",
    "load",
    "methods",
    "pack_",
    "restore",
    "save",
    "sparsify",
    "tune",
    "unpack_",
]


class _Package(types.ModuleType):
    """Importing the module ``sparsec.explain`` must not put it in the place of the function ``sparsec.explain``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, types.ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "onnx":  # the one module among the functions
        return importlib.import_module("sparsec.onnx")
    if name not in _HOME:
        raise AttributeError(f"module 'sparsec' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
