"""Triton kernels for NVIDIA GPUs: one family a pattern, each in its own file, imported when first asked for.

Importing this package imports no triton; asking for a family does. Raises NoTriton where it is missing.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, cast

from sparsec.errors import NoTriton, RoundTripMismatch
from sparsec.formats import Format

if TYPE_CHECKING:
    import torch

    from sparsec.codegen.spec import Packed
    from sparsec.codegen.triton.contract import Family

FAMILIES = {kind: f"sparsec.codegen.triton.{kind}:FAMILY" for kind in ("index", "block", "dense")}
KNOWN = ("3.6", "3.9")  # versions of Triton that the kernels were compiled with, first and last


@functools.cache
def family(kind: str) -> Family:
    """The family of a pattern kind, a key of ``FAMILIES``. Raises KeyError for any other, and NoTriton."""
    module, _, name = FAMILIES[kind].partition(":")
    need_triton()
    return cast("Family", getattr(importlib.import_module(module), name))


def need_triton() -> str:
    """Triton's version. Raises NoTriton."""
    try:
        import triton
    except ImportError as error:
        raise NoTriton(needs=f"triton {KNOWN[0]} or newer", found=f"it cannot be imported ({error})") from None
    version = str(triton.__version__)
    if tuple(map(int, version.split(".")[:2])) < tuple(map(int, KNOWN[0].split("."))):
        raise NoTriton(needs=f"triton {KNOWN[0]} or newer", found=f"{version} is installed")
    return version


def pack_verified(weight: torch.Tensor, format: Format, source_key: str) -> Packed:
    """Pack a [N, K] weight on its device and prove it: unpacking must give every bit back, but -0.0 may become 0.0.

    Raises PatternMismatch, RoundTripMismatch, NoTriton; torch.OutOfMemoryError where the GPU has no room for it.
    """
    import torch

    chosen = family(format.pattern.kind)
    packed = chosen.pack(weight.detach(), format, source_key)
    back = chosen.unpack(packed)
    same = (back == weight) | (back.isnan() & weight.isnan())
    if back.dtype == weight.dtype and bool(same.all()):
        return packed
    lost = int((~same).sum())
    row, column = (int(i) for i in (~same).nonzero()[0]) if lost else (0, 0)
    assert isinstance(back, torch.Tensor)
    detail = f"{lost} values, the first in row {row}, column {column}; {back.dtype} for {weight.dtype}"
    raise RoundTripMismatch(format=str(format), detail=detail)
