"""Builds and loads the C++ ops once per process, and gives them their Python halves.

Out: ``load()`` makes ``torch.ops.sparsec.*`` exist. The library is compiled once per machine (about 6 s) and cached.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import torch

from sparsec import compat
from sparsec.cache import cache_dir
from sparsec.codegen import build

_HERE = Path(__file__).parent
_python_half: list[torch.library.Library] = []  # a Library unregisters its ops when it is collected


@functools.cache
def load(chosen_cache: str = "") -> None:
    """Make the ops exist in this process. Raises NoCompiler or CompileFailed."""
    if _python_half:
        return
    text = (_HERE / "op.cpp").read_text()
    headers = (_HERE / name for name in ("active.h", "table.h", "inputs.h", "conv.h", "packed.h"))
    for header in (*headers, Path(build.__file__).parent / "cpp" / "abi.h"):
        inside = header.read_text().replace("#pragma once", "")
        text = text.replace(f'#include "{header.name}"', inside)  # one text, so that one hash names the library
    flags = ["-O2", "-std=c++20", "-fopenmp", *compat.shared_libraries(), f"-DSPARSEC_TORCH_{_torch_tag()}=1"]
    path = build.compile_shared(text, "sparsec_op", flags, cache_dir(chosen_cache))
    torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    _register_python_half()


def _torch_tag() -> str:
    return "".join(c if c.isalnum() else "_" for c in torch.__version__)


def _register_python_half() -> None:
    from sparsec.runtime import packed, parts, store

    library: Any = torch.library.Library("sparsec", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.impl("resolve", store.STORE.resolve_parts, "CPU")
    library.impl("computed", parts.computed, "CPU")
    library.impl("verify", store.STORE.verify, "CPU")
    _python_half.append(library)
    torch.library.register_fake("sparsec::linear", _linear_shape, lib=library)
    torch.library.register_fake("sparsec::linear_codes", _codes_shape, lib=library)
    torch.library.register_fake("sparsec::linear_needed", _needed_shape, lib=library)
    torch.library.register_fake("sparsec::linear_group", _group_shapes, lib=library)
    torch.library.register_fake("sparsec::conv2d", _conv_shape, lib=library)
    packed.register(library)


def _linear_shape(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: str, x_scale: torch.Tensor | None = None
) -> torch.Tensor:
    from sparsec.plan import Plan

    n = weight.shape[1] if Plan.decode(plan).transposed else weight.shape[0]
    return x.new_empty((*x.shape[:-1], n))


def _codes_shape(
    x: torch.Tensor,
    codes: list[torch.Tensor],
    bias: torch.Tensor | None,
    plan: str,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    from sparsec.runtime import parts

    return _linear_shape(x, parts.computed(codes, plan), bias, plan)


def _needed_shape(
    x: torch.Tensor,
    parts: list[torch.Tensor],
    bias: torch.Tensor | None,
    needed: torch.Tensor,
    plan: str,
    x_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    return _codes_shape(x, parts, bias, plan)


def _group_shapes(
    x: torch.Tensor,
    parts: list[torch.Tensor],
    counts: list[int],
    biases: list[torch.Tensor | None],
    plans: list[str],
    x_scales: list[torch.Tensor | None],
) -> list[torch.Tensor]:
    ends = list(itertools.accumulate(counts))
    weights = [parts[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return [_codes_shape(x, w, b, p) for w, b, p in zip(weights, biases, plans, strict=True)]


def _conv_shape(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: str) -> torch.Tensor:
    from sparsec.plan import Plan

    walk = Plan.decode(plan).conv
    assert walk is not None
    shape = (x.shape[0], weight.shape[0], *walk.size(x.shape[2], x.shape[3]))
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return x.new_empty(shape).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
