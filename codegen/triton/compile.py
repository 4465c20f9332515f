"""From a ``Launch`` to a cubin, for any architecture, with no GPU and no driver: Triton brings the assembler.

In: a launch whose tensors lie anywhere (only their dtypes count) and a compute capability. Out: a ``Compiled`` with
the texts of every level. Works with Triton 3.6 and 3.9.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparsec.codegen.triton.launch import Launch, signature
from sparsec.errors import KernelCompileFailed

CAPABILITIES = (80, 89, 90, 100, 120)


@dataclass(frozen=True)
class Compiled:
    """``capability``: 90 for sm_90. ``ttgir``, ``ptx``: text. ``cubin``: machine code."""

    name: str
    capability: int
    ttgir: str
    ptx: str
    cubin: bytes


def compile_launch(launch: Launch, capability: int) -> Compiled:
    """Compile for sm_``capability``. Raises KernelCompileFailed with the first line of what the compiler says."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.6 does by itself, and 3.9 warns about
    types, attributes = signature(launch)
    parameters = {name: i for i, name in enumerate(launch.kernel.arg_names)}
    constants = {(parameters[name],): value for name, value in launch.constants.items()}
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    try:
        made: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except Exception as error:  # Triton raises many kinds; all of them mean the same to a user
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise KernelCompileFailed(name=launch.name, target=f"sm_{capability}", detail=said) from error
    asm: Mapping[str, Any] = made.asm
    return Compiled(launch.name, capability, str(asm["ttgir"]), str(asm["ptx"]), bytes(asm["cubin"]))
