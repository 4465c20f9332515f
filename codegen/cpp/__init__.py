"""C++ kernels for CPUs: one family per pattern, each in its own file, imported when first asked for."""

from __future__ import annotations

import functools
import importlib
from typing import cast

from sparsec.codegen.spec import Family

FAMILIES = {kind: f"sparsec.codegen.cpp.{kind}:FAMILY" for kind in ("bitmap", "index", "nm", "block")}


@functools.cache
def family(kind: str) -> Family:
    """The family of a pattern kind (``bitmap``, ``index``, ``nm``, ``block``). Raises KeyError for any other."""
    module, _, name = FAMILIES[kind].partition(":")
    return cast(Family, getattr(importlib.import_module(module), name))
